"""Options of a head, by name, and what a head takes in memory and traffic."""

import ctypes
import dataclasses
import operator
import os

from . import _abi
from ._library import check, lib

#: What an option's names stand for.
CHOICES = {
    "placement": {"sharded": _abi.PFC_PLACEMENT_SHARDED, "replicated": _abi.PFC_PLACEMENT_REPLICATED},
    "margin_gradient": {
        "exact": _abi.PFC_MARGIN_GRADIENT_EXACT,
        "straight_through": _abi.PFC_MARGIN_GRADIENT_STRAIGHT_THROUGH,
    },
    "margin_guard": {"off": _abi.PFC_MARGIN_GUARD_OFF, "on": _abi.PFC_MARGIN_GUARD_ON},
    "optimizer": {"sgd": _abi.PFC_OPTIMIZER_SGD, "adamw": _abi.PFC_OPTIMIZER_ADAMW},
    "row_update": {"lazy": _abi.PFC_ROW_UPDATE_LAZY, "dense": _abi.PFC_ROW_UPDATE_DENSE},
    "precision": {"auto": _abi.PFC_PRECISION_AUTO, "f32": _abi.PFC_PRECISION_F32, "half": _abi.PFC_PRECISION_HALF},
    "row_terms": {"off": _abi.PFC_ROW_TERMS_OFF, "on": _abi.PFC_ROW_TERMS_ON},
    "weight_dtype": {"f32": _abi.PFC_F32, "bf16": _abi.PFC_BF16},
    "state_dtype": {"f32": _abi.PFC_F32, "bf16": _abi.PFC_BF16},
    "residency": {
        "device": _abi.PFC_RESIDENCY_DEVICE,
        "host": _abi.PFC_RESIDENCY_HOST,
        "file": _abi.PFC_RESIDENCY_FILE,
    },
    "gather_dtype": {"auto": _abi.PFC_GATHER_AUTO, "f32": _abi.PFC_F32, "f16": _abi.PFC_F16, "bf16": _abi.PFC_BF16},
}
#: Fields that a caller does not set.
_OURS = ("struct_size", "reserved")
FIELDS = tuple(name for name, _ in _abi.pfc_head_options._fields_ if name not in _OURS)
#: The signed fields and bits of the others: ctypes would cut a number that does not fit.
_BITS = {ctypes.c_uint64: 64, ctypes.c_uint32: 32}


def fill(values: dict) -> _abi.pfc_head_options:
    """A head's options from their names; those that are not there keep the library's defaults.

    Raises:
        TypeError: a name that no option has, or a value of the wrong type.
        ValueError: a choice that there is not, or a number that does not fit its field.
    """
    options = _abi.pfc_head_options()
    check(lib.pfc_head_options_init_sized(ctypes.byref(options), ctypes.sizeof(options)))
    types = dict(options._fields_)
    for name, value in values.items():
        if name not in FIELDS:
            raise TypeError(f"{name} is no option of a head; these are: {', '.join(FIELDS)}")
        choices = CHOICES.get(name)
        if choices is not None:
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; it must be {' or '.join(map(repr, choices))}")
            value = choices[value]
        if types[name] is not ctypes.c_double and hasattr(value, "__index__"):
            value = operator.index(value)  # NumPy's integers, which ctypes does not take.
        bits = _BITS.get(types[name])
        if bits is not None and isinstance(value, int) and not 0 <= value < 2**bits:
            raise ValueError(f"{name} is {value}; it must be 0 to {2**bits - 1}")
        if types[name] is ctypes.c_int64 and isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} is {value}; it must fit 64 bits")
        try:
            is_path = types[name] is ctypes.c_char_p and value is not None
            setattr(options, name, os.fsencode(value) if is_path else value)
        except TypeError as error:
            raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; {error}") from error
    return options


def names(options: _abi.pfc_head_options) -> dict:
    """The options of a head as `fill` takes them."""
    out = {}
    for name in FIELDS:
        value = getattr(options, name)
        if isinstance(value, bytes):
            value = os.fsdecode(value)
        for choice, code in CHOICES.get(name, {}).items():
            if code == value:
                value = choice
                break
        out[name] = value
    return out


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of memory on the rank that owns most, and bytes that one rank passes to each collective in a step."""

    #: Rows of W on the rank that owns most.
    shard_rows: int
    #: Most classes that a step's sample can have on that rank.
    sample_capacity: int
    #: Bytes of W.
    weight_bytes: int
    #: Bytes of optimizer state and, for dense row updates, the number of the last update of each row.
    state_bytes: int
    #: Bytes of embeddings, their gradient and the accumulators.
    activation_bytes: int
    #: Bytes of the softmax numerators that are kept from forward to update.
    probability_bytes: int
    #: The sum of the four before.
    total_bytes: int
    #: Message `labels`, an all-gather.
    labels_bytes: int
    #: Message `embeddings`, an all-gather; 0 when replicated.
    embeddings_bytes: int
    #: Message `sums`, an all-reduce.
    sums_bytes: int
    #: Message `gradient`, a reduce-scatter; 0 when replicated.
    grad_embeddings_bytes: int
    #: Message `center gradient`, an all-reduce; 0 when sharded.
    grad_centers_bytes: int
    #: The sum of the five messages.
    traffic_bytes: int
    #: The file of that rank, for residency "file"; else 0.
    storage_bytes: int
    #: Of total_bytes those in the host's memory: all of them on a CPU; on a GPU W and state for residency "host", else 0.
    host_bytes: int


def plan(num_classes: int, embedding_dim: int, *, ranks: int = 1, batch: int, gpu_memory: int | None = None, **options) -> Plan:
    """Predicts the memory and the traffic of a head, before it is made. Not collective.

    It is that of a head on a CPU; with `gpu_memory` of one on a GPU, which need not be there.

    Args:
        ranks: number of ranks.
        batch: rows on each rank.
        gpu_memory: bytes of a rank's GPU that are free for the head.
        options: as of `Head`.
    """
    values = {"num_classes": num_classes, "embedding_dim": embedding_dim, "max_batch": batch, **options}
    report = _abi.pfc_plan_report()
    check(lib.pfc_plan_report_init_sized(ctypes.byref(report), ctypes.sizeof(report)))
    filled = ctypes.byref(fill(values))
    if gpu_memory is None:
        check(lib.pfc_plan(filled, ranks, batch, ctypes.byref(report)))
    else:
        check(lib.pfc_plan_cuda(filled, ranks, batch, gpu_memory, ctypes.byref(report)))
    return Plan(*(getattr(report, field.name) for field in dataclasses.fields(Plan)))
