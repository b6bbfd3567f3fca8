"""The head: a shard of the class centers, their optimizer state, and the step that trains them."""

import ctypes
import dataclasses
import operator
import os

import numpy as np

from . import _abi, _transfer
from ._arrays import Reader, like
from ._handles import Handle
from ._library import check, failure, lib
from .comm import Comm
from .device import Device
from .metrics import Metrics
from .options import fill, names

_STATES = {"momentum": _abi.PFC_STATE_MOMENTUM, "second_moment": _abi.PFC_STATE_SECOND_MOMENT}


def state_names(optimizer: str) -> tuple[str, ...]:
    """The names of an optimizer's state."""
    return tuple(_STATES) if optimizer == "adamw" else ("momentum",)


class Head(Handle):
    """The classification head of one rank: forward, backward and update, or `step`, which is all three.

    Making one is collective: every rank does, with the same options. Arrays are NumPy's, torch's, or those of
    `__cuda_array_interface__` or DLPack 1, and are used where they lie: embeddings and gradients are (B, d) in
    float32, float16 or bfloat16 with contiguous rows, labels are (B,) or (B, 1) in int64. A CPU head takes arrays
    in host memory, a CUDA head also those of its own GPU. One thread at a time may be in a head.

    Errors of arguments are TypeError or ValueError, and name the argument, the value and the rank. The other
    ranks of the call get `PartialFCError` REMOTE. What the library finds is `PartialFCError`; after LABEL,
    NOT_FINITE and INVALID_ARGUMENT nothing has been updated and the head remains usable.

    Args:
        num_classes: C, classes over all ranks.
        embedding_dim: d, elements of an embedding.
        max_batch: rows of the largest batch on any rank. 0: it makes room for larger ones as they come; on a GPU each
            step then waits for the labels.
        device: where it computes; None: the CPU, with all cores.
        comm: the ranks; None: this one alone.
        placement: "sharded": each class center lives on one rank. "replicated": all on every rank.
        sample_rate: share of a shard's classes that take part in a step, 0 to 1. Positives always do.
        sample_block: negatives are drawn in runs of as many consecutive classes, a power of two up to 1024.
        seed: of the start values and of the sampling.
        scale: factor of the cosines, above 0 and at most 128.
        m1: target logit = scale * (cos(m1 * theta + m2) - m3).
        m2: radians, 0 to pi.
        m3: 0 to 2.
        interclass_filter: a negative whose cosine is above it gets no gradient. 0: off.
        margin_gradient: "exact", or "straight_through" as insightface's arcface_torch has it.
        margin_guard: "on" keeps the target logit falling where m1 * theta + m2 exceeds pi.
        optimizer: "sgd" or "adamw".
        row_update: "lazy": only the sampled rows change. "dense": all get weight decay and momentum.
        momentum, weight_decay, beta1, beta2, epsilon: of the optimizer.
        gradient_scale: factor of the embeddings' gradient; the number of ranks if the trainer averages the
            backbone's gradients over them.
        init_std: standard deviation of the start values.
        ignore_label: rows with this label are ignored and may hold NaN. The smallest int64: none.
        precision: "auto", "f32" or "half".
        gather_dtype: "auto", "f32", "f16" or "bf16": the type in which embeddings are sent.
        weight_dtype, state_dtype: "f32" or "bf16": the types in which class centers and optimizer state are
            stored. Updates of class centers in bf16 are rounded at random, so that small ones count.
        residency: "device"; "host", which is the same on a CPU: a GPU then reads and writes class centers and state in
            page-locked memory of the host; or, on a CPU, "file": each rank keeps them in a file of its own in the
            directory `storage_path`, and memory holds the rows of a step and the first ones of the rank that fit
            `storage_cache` bytes.
        workspace_limit: bytes beside class centers and state; 0: the library decides.
        row_terms: "on" for a `forward` with m2, m3 or weight of each row.
        metrics_every: collects `last_metrics` in every n-th update, on all ranks; 0: never.
    """

    _what = "head"
    _free = "pfc_head_free"

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        max_batch: int = 0,
        *,
        device: Device | None = None,
        comm: Comm | None = None,
        placement: str = "sharded",
        sample_rate: float = 1.0,
        seed: int = 0,
        scale: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.5,
        m3: float = 0.0,
        interclass_filter: float = 0.0,
        margin_gradient: str = "exact",
        margin_guard: str = "off",
        optimizer: str = "sgd",
        row_update: str = "lazy",
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        gradient_scale: float = 1.0,
        init_std: float = 0.01,
        ignore_label: int = -(2**63),
        precision: str = "auto",
        gather_dtype: str = "auto",
        weight_dtype: str = "f32",
        state_dtype: str = "f32",
        residency: str = "device",
        workspace_limit: int = 0,
        storage_path: str | os.PathLike | None = None,
        storage_cache: int = 0,
        row_terms: str = "off",
        sample_block: int = 1,
        metrics_every: int = 0,
    ):
        arguments = locals()
        self.device = Device.cpu() if device is None else device
        self.comm = Comm.self() if comm is None else comm
        rank = self.comm.rank
        names_given = {name: value for name, value in arguments.items() if name not in _NOT_OPTIONS}
        try:
            options = fill(names_given)
        except (TypeError, ValueError):
            # So that no rank waits for this one: options that are wrong reach all of them.
            self.comm._run(lib.pfc_head_create, self.device._address, self.comm._address, None, ctypes.byref(ctypes.c_void_p()))
            raise
        out = ctypes.c_void_p()
        self.comm._call(
            lib.pfc_head_create, self.device._address, self.comm._address, ctypes.byref(options), ctypes.byref(out)
        )
        self._own(out)
        # What the head calls must not be gone before it.
        self._state.keep = (self.comm._state, self.device._state)
        #: Every option, by its name.
        self.options = names(options)
        self.embedding_dim = embedding_dim
        self.num_classes = num_classes
        self.max_batch = max_batch
        self.metrics_every = metrics_every
        self._last_metrics: Metrics | None = None
        self._updates = 0
        self._reader = Reader(rank, self.device.ordinal, self.device.stream)
        # Reused by every call: filling a struct costs less than making one.
        self._embeddings = _abi.pfc_matrix()
        self._gradient = _abi.pfc_matrix()
        self._embeddings_at = ctypes.byref(self._embeddings)
        self._gradient_at = ctypes.byref(self._gradient)
        self._update_options = _abi.pfc_update_options()
        self._update_options_at = ctypes.byref(self._update_options)
        check(lib.pfc_update_options_init_sized(self._update_options_at, ctypes.sizeof(self._update_options)))
        self._forward_options = _abi.pfc_forward_options()
        self._forward_options_at = ctypes.byref(self._forward_options)
        check(lib.pfc_forward_options_init_sized(self._forward_options_at, ctypes.sizeof(self._forward_options)))
        self._backward_options = _abi.pfc_backward_options()
        self._backward_options_at = ctypes.byref(self._backward_options)
        check(lib.pfc_backward_options_init_sized(self._backward_options_at, ctypes.sizeof(self._backward_options)))
        self._loss = ctypes.c_double()
        self._loss_at = ctypes.byref(self._loss)
        #: The embeddings of the last forward, and their rows.
        self._batch = None
        self._waits = self.comm.size > 1

    # The step.

    def forward(self, embeddings, labels=None, loss=None, *, m2=None, m3=None, weight=None) -> float:
        """Phases 1 to 4 of a step, up to the loss. Collective. A forward without an update before it abandons that step.

        Args:
            embeddings: (B, d), not normalized; B may differ between ranks and may be 0.
            labels: (B,) class ids, 0 to C - 1 or ignore_label; None: those of `prepare`.
            loss: a float64 array of one element to write the loss to, such as a torch tensor on the GPU; then
                the call does not wait for the GPU.
            m2, m3: (B,) float32, the rows' own margins: radians from -pi to pi, cosines from 0 to 2. None: those of
                the options. With one of these or `weight` the head needs row_terms="on". Ranks may differ in what
                they give.
            weight: (B,) float32, 0 or more: multiplies the row's loss. None: 1. The mean still is over all valid rows.

        Returns:
            The mean over the valid rows of all ranks, the same on every rank; with `loss`, that array.

        Raises:
            PartialFCError: LABEL or NOT_FINITE, and INVALID_ARGUMENT for a margin or a weight out of its range, on all
                ranks, with nothing updated and the head usable.
        """
        own = m2 is not None or m3 is not None or weight is not None
        try:
            rows = self._reader.matrix(embeddings, "embeddings", self.embedding_dim, self._embeddings)
            self._fits(rows)
            ids = None if labels is None else self._reader.vector(labels, "labels", rows)
            out = None if loss is None else self._reader.flat(loss, "loss", code=_abi.PFC_F64, count=1, write=True)
            given = [self._of_rows(x, name, rows) for x, name in ((m2, "m2"), (m3, "m3"), (weight, "weight"))] if own else ()
        except (TypeError, ValueError):
            self._refuse_forward()
            raise
        self._batch = embeddings, rows
        labels_at = None if ids is None else ids[0]
        loss_at = self._loss_at if out is None else out.address
        if own:
            options = self._forward_options
            options.m2, options.m3, options.weight = (None if view is None else view.address for view in given)
            self._call(lib.pfc_head_forward_with, self._embeddings_at, labels_at, self._forward_options_at, loss_at)
        else:
            self._call(lib.pfc_head_forward, self._embeddings_at, labels_at, loss_at)
        return self._loss.value if out is None else loss

    def backward(self, gradient=None, *, loss_weight: float = 1.0, loss_scale: float = 1.0, grad_m2=None, grad_m3=None):
        """Phase 5 for the embeddings: their gradient. Collective. After `forward`.

        Args:
            gradient: (B, d), written; None: a new array like the embeddings.
            loss_weight: multiplies the loss, so also this step's gradient of the class centers.
            loss_scale: multiplies what is written only.
            grad_m2, grad_m3: (B,) float32, written: the derivatives of the loss by the rows' m2 and m3, with the factors
                of the gradient. None: not wanted. They need row_terms="on".

        Returns:
            The gradient, times loss_weight * loss_scale * gradient_scale.
        """
        try:
            if self._batch is not None:  # Else the library tells what is out of order.
                gradient = self._gradient_for(gradient, *self._batch)
            rows = None if self._batch is None else self._batch[1]
            margins = [self._of_rows(x, name, rows, write=True) for x, name in ((grad_m2, "grad_m2"), (grad_m3, "grad_m3"))]
        except (TypeError, ValueError):
            self._refuse(lib.pfc_head_backward, loss_weight, loss_scale, None)
            raise
        if margins == [None, None]:
            self._call(lib.pfc_head_backward, loss_weight, loss_scale, self._gradient_at)
            return gradient
        options = self._backward_options
        options.loss_weight, options.loss_scale = float(loss_weight), float(loss_scale)
        options.grad_m2, options.grad_m3 = (None if view is None else view.address for view in margins)
        self._call(lib.pfc_head_backward_with, self._backward_options_at, self._gradient_at)
        return gradient

    def update(self, learning_rate: float, factor: float = 1.0, device_factor=None) -> None:
        """Phase 5 for the class centers: updates the sampled rows. After `backward` or `accumulate`. Collective when replicated.

        Args:
            learning_rate: 0 or more.
            factor: multiplies the class centers' gradient: clipping, a weight of the loss that is known late. If it is
                not finite the update is skipped, and `skipped_updates` counts it. The same on all ranks.
            device_factor: multiplies it, too: a float32 array of one element in host memory or that of the head's GPU,
                which the call does not wait for; None: 1.
        """
        options = self._update_options
        options.learning_rate, options.factor, options.device_factor = float(learning_rate), float(factor), None
        if device_factor is not None:
            given = self._reader.flat(device_factor, "device_factor", code=_abi.PFC_F32, count=1)
            options.device_factor = given.address
        self._call(lib.pfc_head_update_with, self._update_options_at)
        self._updated()

    def accumulate(self) -> None:
        """Keeps the step's gradient of the class centers for the next `update`. After `backward`, in place of `update`.

        The update applies what all calls have kept and its own step's, if there is one, at once, as an optimizer
        does after several backwards. Not collective, but all ranks call it, or none.
        """
        self._call(lib.pfc_head_accumulate)

    def step(self, embeddings, labels, learning_rate: float, gradient=None):
        """Forward, backward and update in one call. Collective.

        Args:
            embeddings: (B, d), not normalized.
            labels: (B,) class ids; None: those of `prepare`.
            learning_rate: 0 or more.
            gradient: (B, d), written; None: a new array like the embeddings.

        Returns:
            (loss, gradient)
        """
        try:
            rows = self._reader.matrix(embeddings, "embeddings", self.embedding_dim, self._embeddings)
            self._fits(rows)
            ids = None if labels is None else self._reader.vector(labels, "labels", rows)
            gradient = self._gradient_for(gradient, embeddings, rows)
            learning_rate = float(learning_rate)
        except (TypeError, ValueError):
            self._refuse(lib.pfc_head_step, None, None, 0.0, None, self._loss_at)
            raise
        self._call(
            lib.pfc_head_step,
            self._embeddings_at,
            None if ids is None else ids[0],
            learning_rate,
            self._gradient_at,
            self._loss_at,
        )
        self._updated()
        return self._loss.value, gradient

    def prepare(self, labels) -> None:
        """Begins the next step early: gathers the labels and draws the sample. Collective. Optional.

        Args:
            labels: (B,) class ids; copied.
        """
        try:
            address, rows, _source = self._reader.vector(labels, "labels")
            self._fits(rows)
        except (TypeError, ValueError):
            self._refuse(lib.pfc_head_prepare, None, 1)
            raise
        self._call(lib.pfc_head_prepare, address, rows)

    def set_sample(self, ids) -> None:
        """Sets the class ids of the next sample, instead of a draw. Not collective. Missing positives are added.

        Args:
            ids: ascending, without repeats, all in this rank's shard; copied.
        """
        address, count, _source = self._reader.vector(ids, "ids")
        self._local(lib.pfc_head_set_sample, address, count)

    def sample_ids(self) -> np.ndarray:
        """The class ids of this rank's last sample, ascending, int64."""
        count = ctypes.c_uint64()
        self._local(lib.pfc_head_sample_ids, None, 0, ctypes.byref(count))
        ids = np.empty(count.value, np.int64)
        self._local(lib.pfc_head_sample_ids, ids.ctypes.data, ids.size, ctypes.byref(count))
        return ids

    def wait(self) -> None:
        """Waits for the device, and raises what failed since the last call. See `pfc_head_wait` of the header."""
        self._call(lib.pfc_head_wait)

    # What it measures and finds.

    def metrics(self) -> Metrics:
        """Measurements of the last step. Collective: all ranks must call it, or none; see `own_metrics`, `last_metrics`."""
        return self._measured(lib.pfc_head_metrics)

    def own_metrics(self) -> Metrics:
        """What this rank knows of the last step. Not collective; on a GPU it waits for what has been enqueued.

        sample_size, the seconds and the norms of gradients are this rank's. top1 is NaN on a sharded head of several
        ranks; on a replicated one it is that of this rank's rows.
        """
        return self._measured(lib.pfc_head_last_metrics)

    def _measured(self, function) -> Metrics:
        out = _abi.pfc_metrics()
        check(lib.pfc_metrics_init_sized(ctypes.byref(out), ctypes.sizeof(out)))
        self._call(function, ctypes.byref(out))
        return Metrics(*(getattr(out, field.name) for field in dataclasses.fields(Metrics)))

    @property
    def last_metrics(self) -> Metrics | None:
        """What the last update that `metrics_every` names has measured. Not collective: rank 0 alone may log it."""
        return self._last_metrics

    def top_k(self, embeddings, k: int, ids=None, cosines=None):
        """The k class centers nearest to each embedding, over all classes of all ranks. Collective; changes nothing.

        Args:
            embeddings: (rows, d); rows may differ between ranks and may exceed max_batch.
            k: 1 to C, equal on all ranks.
            ids: (rows, k) int64, written; None: a new array of the embeddings' kind.
            cosines: (rows, k) float32, written; None: a new array.

        Returns:
            (ids, cosines), nearest first; equal cosines in ascending order of id.
        """
        matrix = _abi.pfc_matrix()
        try:
            rows = self._reader.matrix(embeddings, "embeddings", self.embedding_dim, matrix)
            k = operator.index(k)
            if not 1 <= k <= self.num_classes:
                raise ValueError(f"k is {k}{self._reader.at}; it must be 1 to {self.num_classes}")
            ids = like(embeddings, (rows, k), "int64") if ids is None else ids
            cosines = like(embeddings, (rows, k), "float32") if cosines is None else cosines
            ids_view = self._reader.block(ids, "ids", (rows, k), _abi.PFC_I64)
            cosines_view = self._reader.block(cosines, "cosines", (rows, k), _abi.PFC_F32)
        except (TypeError, ValueError):
            self._refuse(lib.pfc_head_top_k, None, 1, None, None)
            raise
        self._call(lib.pfc_head_top_k, ctypes.byref(matrix), k, ids_view.address, cosines_view.address)
        return ids, cosines

    # Rows: what there is to save and restore.

    @property
    def shard(self) -> tuple[int, int]:
        """(first, count): this rank owns the classes first to first + count - 1."""
        first, count = ctypes.c_uint64(), ctypes.c_uint64()
        self._local(lib.pfc_head_shard, ctypes.byref(first), ctypes.byref(count))
        return first.value, count.value

    def read_centers(self, first: int | None = None, count: int | None = None, out=None):
        """Class centers of this rank's shard as of the last update. Not collective.

        Args:
            first: id of the first class; None: the shard's first.
            count: number of classes; None: to the shard's end.
            out: (count, d), written; None: a new float32 array of NumPy.
        """
        return self._read(lib.pfc_head_read_centers, (), first, count, out)

    def write_centers(self, centers, first: int | None = None) -> None:
        """Overwrites class centers of this rank's shard. Not collective; not between forward and update.

        Args:
            centers: (count, d), all finite.
            first: id of the first class; None: the shard's first.
        """
        self._write(lib.pfc_head_write_centers, (), centers, "centers", first)

    def read_state(self, name: str = "momentum", first: int | None = None, count: int | None = None, out=None):
        """Optimizer state, as `read_centers` does.

        Args:
            name: "momentum" (AdamW: the first moment), or AdamW's "second_moment".
        """
        return self._read(lib.pfc_head_read_state, (self._tensor(name),), first, count, out)

    def write_state(self, state, name: str = "momentum", first: int | None = None) -> None:
        """Overwrites optimizer state, as `write_centers` does."""
        self._write(lib.pfc_head_write_state, (self._tensor(name),), state, name, first)

    def read_progress(self) -> tuple[int, int]:
        """(draws, updates): with the class centers and their state all there is to save. Not collective.

        With row_update "dense" this brings every row up to date, on all ranks of a replicated head or on none.
        """
        draws, updates = ctypes.c_uint64(), ctypes.c_uint64()
        self._local(lib.pfc_head_read_progress, ctypes.byref(draws), ctypes.byref(updates))
        return draws.value, updates.value

    def write_progress(self, draws: int, updates: int) -> None:
        """Goes on from the progress of another head, after its rows have been written. Not collective."""
        self._local(lib.pfc_head_write_progress, operator.index(draws), operator.index(updates))

    def save(self, directory, progress=None) -> None:
        """Saves class centers, optimizer state and progress to a directory that all ranks see. Collective.

        The checkpoint that was in the directory stays whole until the new one is, and then goes. Not between `accumulate`
        and the update.

        Args:
            directory: a path; made if it is not there.
            progress: called with the bytes of this rank that are done and how many there are; it must not call this
                library. What it raises is raised when the checkpoint is saved.
        """
        _transfer.save(self, directory, progress)

    def save_start(self, directory, progress=None) -> None:
        """Begins a save that goes on beside training: copies what `save` would write, and lets a thread write it. Collective.

        The checkpoint is that of now; it is there when `save_poll` says so. The copy takes as much memory as the rows that
        this rank writes, until they are written. A head that is closed gives the save up.

        Args:
            directory: as for `save`.
            progress: as for `save`; told of the copy.
        """
        _transfer.save_start(self, directory, progress)

    def save_poll(self, progress=None) -> bool:
        """Whether the save that `save_start` has begun is over, and the directory has the new checkpoint. Collective.

        Call it between two steps every now and then; after the last one in a loop with a pause.

        Args:
            progress: as for `save`; told, once, how far this rank's file is. Where it raises, the poll's answer is lost.

        Raises:
            PartialFCError: INVALID_ARGUMENT where no save is under way, as after one that has failed; IO where the system
                refuses, and REMOTE on the other ranks, as by `save`: then the save is over.
        """
        return _transfer.save_poll(self, progress)

    def load(self, directory, progress=None, class_map=None, class_weights=None) -> None:
        """Loads a checkpoint of any number of ranks, and goes on from there. Collective.

        The head must have its embedding_dim and optimizer, and without a class_map its num_classes; on as many ranks, with
        all options of the head that was saved, it goes on with the same bits.

        Args:
            directory: a path.
            progress: as for `save`.
            class_map: for each class of the checkpoint the class of this head that it becomes, or -1: none. Classes that
                none becomes begin anew; those that several become have the mean of their directions. int64, the same on
                all ranks. None: the classes are the same.
            class_weights: with class_map, how much each class of the checkpoint counts in such a mean. None: all alike.

        Raises:
            PartialFCError: MISMATCH for another kind of head, CORRUPT where a file is not what was written. If that is found
                in the rows, the heads of all ranks are at their end.
        """
        _transfer.load(self, directory, progress, class_map, class_weights)

    def resize(self, num_classes: int, progress=None) -> None:
        """Adds new classes behind those that there are, or removes the last ones. Collective; between two steps.

        For the arguments and the errors of this and the two calls that follow see `remap`.
        """
        _transfer.resize(self, num_classes, progress)

    def remap(self, class_map, num_classes: int | None = None, progress=None, class_weights=None) -> None:
        """Gives classes other numbers, removes some, makes several one, and adds new ones. Collective; between two steps.

        Rows keep their state, but for those that several become. While it runs the head has its rows twice.

        Args:
            class_map: as for `load`, for each class of this head.
            num_classes: of the head from now on; None: those that class_map names, and no others.
            progress: as for `save`.
            class_weights: as for `load`, such as each class's number of images.

        Raises:
            PartialFCError: the heads of all ranks are usable, with the classes that they had, unless it is of the communicator.
        """
        _transfer.remap(self, class_map, num_classes, progress, class_weights)

    def merge(self, pairs, progress=None, class_weights=None) -> np.ndarray:
        """Makes classes one that turned out to be one identity; those behind a class that goes move up. Collective; between two steps.

        Args:
            pairs: {class that goes: class that both are from now on}, or pairs of them.

        Returns:
            For each class that the head had its new number, by which labels have to change.
        """
        return _transfer.merge(self, pairs, progress, class_weights)

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the optimizer's state."""
        return state_names(self.options["optimizer"])

    def __repr__(self) -> str:
        if self.closed:
            return "<partialfc.Head, closed>"
        first, count = self.shard
        options = self.options
        return (
            f"<partialfc.Head, {self.num_classes} classes x {self.embedding_dim}, {first} to {first + count - 1} on rank "
            f"{self.comm.rank} of {self.comm.size}, {options['placement']}, rate {options['sample_rate']}, "
            f"{options['optimizer']}, gradient_scale {options['gradient_scale']}>"
        )

    # Inside.

    def _rank(self):
        return self.comm.rank

    def _call(self, function, *arguments, later: bool = False) -> None:
        """Calls a collective; where ranks wait for each other, Ctrl-C may end it. `later` as in `Comm._run`."""
        state, comm = self._state, self.comm
        address = state.address or self._address
        state.calls += 1
        try:
            status = comm._run(function, address, *arguments, later=later)
        finally:
            state.calls -= 1
        if status:
            raise comm._failure(status)

    def _local(self, function, *arguments) -> None:
        status = function(self._address, *arguments)
        if status:
            raise failure(status, self.comm.rank)

    def _refuse(self, function, *arguments) -> None:
        """Makes a collective call without the arguments that were wrong: so the other ranks learn of it, and none waits."""
        if self._waits and not self.closed:
            self.comm._run(function, self._address, *arguments)

    def _has_classes(self, num_classes: int) -> None:
        self.num_classes = self.options["num_classes"] = int(num_classes)

    def _refuse_forward(self) -> None:
        self._refuse(lib.pfc_head_forward, None, None, self._loss_at)

    def _fits(self, rows: int) -> None:
        if rows > self.max_batch > 0:
            raise ValueError(f"a batch of {rows} rows{self._reader.at} is beyond max_batch, which is {self.max_batch}")

    def _of_rows(self, x, name: str, rows: int | None, write: bool = False):
        """Where an array with a float32 for each row lies; None for None."""
        return None if x is None else self._reader.flat(x, name, code=_abi.PFC_F32, count=rows, write=write)

    def _gradient_for(self, gradient, embeddings, rows: int):
        if gradient is None:
            gradient = like(embeddings, (rows, self.embedding_dim), None)
        self._reader.matrix(gradient, "gradient", self.embedding_dim, self._gradient, write=True)
        return gradient

    def _updated(self) -> None:
        if self.metrics_every:
            self._updates += 1
            if self._updates % self.metrics_every == 0:
                self._last_metrics = self.metrics()

    def _tensor(self, name: str) -> int:
        if name not in _STATES:
            raise ValueError(f"name is {name!r}{self._reader.at}; it must be {' or '.join(map(repr, _STATES))}")
        return _STATES[name]

    def _read(self, function, tensor, first, count, out):
        shard_first, shard_count = self.shard
        first = shard_first if first is None else first
        if out is None:
            count = shard_first + shard_count - first if count is None else count
            out = np.empty((max(count, 0), self.embedding_dim), np.float32)
        matrix = _abi.pfc_matrix()
        rows = self._reader.matrix(out, "out", self.embedding_dim, matrix, write=True)
        count = rows if count is None else operator.index(count)
        self._local(function, *tensor, operator.index(first), count, ctypes.byref(matrix))
        return out

    def _write(self, function, tensor, rows, name, first) -> None:
        matrix = _abi.pfc_matrix()
        count = self._reader.matrix(rows, name, self.embedding_dim, matrix)
        first = self.shard[0] if first is None else first
        self._local(function, *tensor, operator.index(first), count, ctypes.byref(matrix))


_NOT_OPTIONS = ("self", "device", "comm", "metrics_every")

