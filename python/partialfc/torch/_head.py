"""The module: a step of the head as autograd sees it, and its update as the optimizer's step causes it."""

import contextlib
import datetime
import math
import weakref

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .. import _abi
from ..comm import Comm
from ..device import Device
from ..head import Head as LibraryHead
from ..metrics import Metrics
from .._library import PartialFCError, lib
from ..options import fill, names
from . import _groups, _hooks

#: The anchor's gradient is the weight of the loss times this. It is a power of two, so that unscaling and clipping
#: multiply it exactly, and so small that a norm over all parameters is the same to the last bit without it.
_UNIT = 2.0**-60


def _on_gpu(tensor: torch.Tensor) -> bool:
    """Whether to read a tensor would wait for a GPU."""
    return tensor.is_cuda


def _autocast(kind: str):
    """The type that autocast computes in on a kind of device, or None."""
    try:
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    except (AttributeError, TypeError):  # Before torch 2.4 a GPU's, which is where float16 is.
        return torch.get_autocast_gpu_dtype() if kind == "cuda" and torch.is_autocast_enabled() else None


def _float_rows(values: torch.Tensor) -> torch.Tensor:
    """A number for each row as the library takes them."""
    if not isinstance(values, torch.Tensor) or not values.dtype.is_floating_point:
        return values  # The library's head says what is wrong with it.
    return values.detach().to(torch.float32).contiguous()


def _empty_rows(rows: int, device, wanted) -> dict:
    """Tensors for the gradients of the margins that are wanted."""
    names = [name for name, form in zip(("grad_m2", "grad_m3"), wanted) if form is not None]
    return {name: torch.empty(rows, dtype=torch.float32, device=device) for name in names}


def _formed(margins: dict, wanted) -> list:
    """The gradients of m2 and m3 in the shape and type of these, None where they are not wanted."""
    found = (margins.get(name) for name in ("grad_m2", "grad_m3"))
    return [None if form is None else values.reshape(form[0]).to(form[1]) for values, form in zip(found, wanted)]


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, anchor, head, labels, m2, m3, weight):
        loss = head._forward(embeddings, labels, m2, m3, weight)
        ctx.margins = [None if x is None else (x.shape, x.dtype) for x in (m2, m3)]
        ctx.head, ctx.number = head, head._run.number
        ctx.form = embeddings.shape, embeddings.dtype, embeddings.device
        ctx.save_for_backward(loss.clone())  # The caller may change its own: loss /= k.
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, weight):
        (loss,) = ctx.saved_tensors
        wanted = [form if needs else None for form, needs in zip(ctx.margins, ctx.needs_input_grad[4:6])]
        gradient, anchor, margins = ctx.head._backward(ctx.number, ctx.form, loss, weight, wanted)
        return gradient, anchor, None, None, *margins, None


class _Run:
    """Where the step is. Apart from the module, whose attributes are slow to set."""

    __slots__ = (
        "error",
        "factor",
        "forwarded",
        "kept",
        "number",
        "places",
        "rate_watch",
        "ready",
        "strangers",
        "weights",
    )

    def __init__(self):
        #: Forwards so far: which one a backward belongs to.
        self.number = 0
        #: Of a forward that failed and gave NaN.
        self.error: PartialFCError | None = None
        #: Whether the last forward succeeded and has had no backward.
        self.forwarded = False
        #: Whether the last backward's gradient of the class centers is there, to be used by an update.
        self.ready = False
        #: Whether the library keeps those of micro-batches before it.
        self.kept = False
        #: The weights of the losses that these are of: numbers that the library has applied, or a GPU's tensors.
        self.weights: list = []
        #: What multiplies the gradient, while an optimizer that holds the anchor is in its step: a number or a GPU's tensor.
        self.factor: float | torch.Tensor | None = None
        #: Where optimizers hold the anchor.
        self.places = weakref.WeakKeyDictionary()
        #: Kinds of the optimizers without the anchor that have stepped since the last backward.
        self.strangers: set = set()
        self.rate_watch = _hooks.RateWatch()


class Head(torch.nn.Module):
    """The classification head of this rank: ``loss = head(embeddings, labels)``.

    `parameters()` gives one parameter of one element, the anchor. Give it to the optimizer, in a group of its own or
    with the backbone's: whenever that optimizer steps, the class centers are updated with the learning rate of the
    anchor's group. The class centers are no parameters, so DDP neither copies nor averages them, and the whole model
    may be wrapped. An optimizer step that a GradScaler leaves out leaves the head as it was. Gradients of several
    backwards add up until the optimizer's step, as those of parameters do; `zero_grad` drops them.

    The head is made with the first batch, on the anchor's device (`.to()`, `.cuda()`), with the ranks of the process
    group; that is collective.

    Args:
        num_classes: C, classes over all ranks.
        embedding_dim: d, elements of an embedding.
        group: the process group; None: all ranks or, without torch.distributed, this process alone.
        comm: a communicator to use instead of a process group.
        max_batch: rows of the largest batch on any rank. 0: any; on a GPU each step then waits for the labels. None: 0
            on a CPU, the first batch on a GPU.
        gradient_scale: factor of the embeddings' gradient. "auto": the number of ranks, because DDP and FSDP average
            the backbone's gradients over them; 1 for a trainer that adds them.
        nonfinite: what a NaN or an infinity in the embeddings is. "raise": an error of the forward, on all ranks.
            "skip": a loss and gradients of NaN, which a GradScaler takes as an overflow; an optimizer step that
            no GradScaler has left out raises. "auto": "skip" under autocast to float16, else "raise".
        metrics_every: collects `last_metrics` in every n-th update; 0: never.
        timeout: the longest that a wait for other ranks may take; None: 10 minutes.
        options: the others of `partialfc.Head`, such as sample_rate, m2, optimizer="adamw". At every step the
            optimizer's kind, momentum, weight decay and so on must be the head's.

    Raises:
        TypeError, ValueError: a wrong argument, with its value and the rank. Other ranks get PartialFCError REMOTE.
        PartialFCError: what the library finds, such as LABEL. Nothing was updated then, and the head is usable.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        group=None,
        comm: Comm | None = None,
        max_batch: int | None = None,
        gradient_scale: float | str = "auto",
        nonfinite: str = "auto",
        metrics_every: int = 0,
        timeout: datetime.timedelta | None = None,
        **options,
    ):
        super().__init__()
        if nonfinite not in ("auto", "raise", "skip"):
            raise ValueError(f"nonfinite is {nonfinite!r}; it must be 'auto', 'raise' or 'skip'")
        if isinstance(gradient_scale, str) and gradient_scale != "auto":
            raise ValueError(f"gradient_scale is {gradient_scale!r}; it must be 'auto' or a number")
        given = {"num_classes": num_classes, "embedding_dim": embedding_dim, **options}
        #: Every option of the head by its name, as the library has it.
        self.options = names(fill(given))
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self._num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.metrics_every = metrics_every
        self.nonfinite = nonfinite
        self._given = given
        self._group, self._comm, self._timeout = group, comm, timeout
        self._max_batch, self._gradient_scale = max_batch, gradient_scale
        self._head: LibraryHead | None = None
        #: What load_state_dict gave before there was a head.
        self._loaded: dict | None = None
        self._run = _Run()
        _hooks.listen(self)

    def __setstate__(self, state):
        """Of a copy, which a head can have before its first batch."""
        super().__setstate__(state)
        self._run = _Run()
        _hooks.listen(self)

    # The step.

    @torch.compiler.disable
    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        *,
        m2: torch.Tensor | None = None,
        m3: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean loss over the valid rows of all ranks, a float32 scalar, the same on every rank. Collective.

        Args:
            embeddings: (B, d), float32, float16 or bfloat16, rows contiguous, not normalized; B may differ between
                ranks and may be 0.
            labels: (B,) or (B, 1), int64: class ids, or ignore_label.
            m2, m3: (B,), the rows' own margins: radians from -pi to pi, cosines from 0 to 2. None: those of the options.
                They may require gradients, which are those of the formula whatever margin_gradient is. With one of
                these or `weight` the head needs row_terms="on".
            weight: (B,), 0 or more: multiplies the row's loss, and has no gradient. None: 1. The mean still is over all
                valid rows.
        """
        return _Step.apply(embeddings, self.anchor, self, labels, m2, m3, weight)

    def update(self, learning_rate: float, factor: float = 1.0) -> None:
        """Updates the class centers without an optimizer. Collective.

        Args:
            factor: multiplies their gradient, as the weight of the loss does.
        """
        self.anchor.grad = None
        weights = self._run.weights
        if weights and isinstance(weights[0], torch.Tensor):
            self._refuse_unequal_weights()
            self._update(learning_rate, weights[0] * factor)
        else:
            self._update(learning_rate, factor)

    def _forward(self, embeddings, labels, m2, m3, weight) -> torch.Tensor:
        head = self._made(embeddings)
        _hooks.keep()
        own = {name: _float_rows(x) for name, x in (("m2", m2), ("m3", m3), ("weight", weight)) if x is not None}
        self._refuse_strangers()
        self._keep_or_drop(head)
        self._run.number += 1
        self._run.ready = self._run.forwarded = False
        self._run.error = None
        if getattr(weight, "requires_grad", False):
            head._refuse_forward()
            raise ValueError(f"weight requires a gradient on rank {head.comm.rank}, and the head has none for it; detach() it")
        embeddings = embeddings.detach()
        with self._on_stream(head, embeddings, labels, *own.values()):
            if head.device.ordinal is not None:
                loss = torch.empty((), dtype=torch.float64, device=embeddings.device)
                loss = head.forward(embeddings, labels, loss=loss, **own).float()
                self._run.forwarded = True
                return loss
            try:
                loss = head.forward(embeddings, labels, **own)
                self._run.forwarded = True
                return torch.tensor(loss, dtype=torch.float32)
            except PartialFCError as error:
                if error.status != _abi.PFC_ERROR_NOT_FINITE or not self._skips():
                    raise
                self._run.error = error
                return torch.tensor(math.nan, dtype=torch.float32)

    def _backward(self, number: int, form, loss: torch.Tensor, weight: torch.Tensor, wanted):
        """The gradients of the embeddings, of the anchor, and of m2 and m3 where a form of theirs is wanted."""
        if number != self._run.number:
            raise RuntimeError(
                f"this is the backward of forward {number} on rank {self._head.comm.rank}, which forward {self._run.number} has "
                "abandoned: a head has one step at a time, so call backward before the next forward"
            )
        run = self._run
        shape, dtype, device = form
        if not _on_gpu(weight) and run.error is None and math.isfinite(scale := weight.item()):
            gradient = torch.empty(shape, dtype=dtype)
            margins = _empty_rows(shape[0], device, wanted)
            self._head.backward(gradient, loss_weight=scale, **margins)
            self._backwarded(scale)
            return gradient, torch.full((1,), scale * _UNIT), _formed(margins, wanted)
        gradient = torch.empty(shape, dtype=torch.float32, device=device)
        margins = _empty_rows(shape[0], device, wanted)
        if run.error is not None:
            for written in (gradient, *margins.values()):
                written.zero_()
        else:
            with self._on_stream(self._head, gradient, *margins.values()):
                self._head.backward(gradient, **margins)
            self._backwarded(weight)
        # A step that failed has the loss NaN. Its gradients are NaN too, so that a GradScaler sees an overflow.
        spoiled = loss * 0.0
        for written in (gradient, *margins.values()):
            written.mul_(weight).add_(spoiled)
        return gradient.to(dtype), (weight * _UNIT + spoiled).reshape(1), _formed(margins, wanted)

    def _backwarded(self, weight) -> None:
        self._run.weights.append(weight)
        self._run.ready, self._run.forwarded = True, False
        self._run.strangers.clear()

    def _update(self, learning_rate: float, factor: float | torch.Tensor) -> None:
        head = self._head
        if head is None:
            raise RuntimeError("a head cannot be updated before its first batch")
        self._run.ready = self._run.kept = False
        self._run.weights.clear()
        if isinstance(factor, torch.Tensor):
            factor = factor.detach().to(torch.float32).reshape(1)
            with self._on_stream(head, factor):
                head.update(learning_rate, device_factor=factor)
        else:
            head.update(learning_rate, 1.0 if abs(factor - 1.0) < 1e-6 else factor)  # As an average in float32 may be.

    def _keep_or_drop(self, head: LibraryHead) -> None:
        """Before a forward: what no step has used of the class centers' gradient goes the way of the anchor's."""
        run = self._run
        if not run.weights:
            return
        share = self.anchor.grad
        if share is not None and share.item() != 0:
            if run.ready:
                head.accumulate()
                run.kept = True
            return
        if run.kept:
            if run.forwarded:
                head.backward()
            head.update(0.0, math.nan)  # Skipped, which drops it.
            run.kept = False
        run.weights.clear()

    def _refuse_unequal_weights(self) -> None:
        """A GPU's backward does not wait for the weight of its loss, so the library has not applied it: one for all it must be."""
        weights = self._run.weights
        if len(weights) < 2:
            return
        numbers = torch.stack(weights).tolist()
        finite = [number for number in numbers if math.isfinite(number)]
        if any(number != finite[0] for number in finite):
            raise RuntimeError(
                f"the losses of the micro-batches have the weights {numbers} on rank {self._head.comm.rank}; on a GPU they must be equal"
            )

    def _refuse_abandoned(self) -> None:
        if not self._run.ready and (self._run.forwarded or not self._run.kept):
            raise RuntimeError(
                f"a forward on rank {self._head.comm.rank} follows the backward whose step this is, and has abandoned it: "
                "step the optimizer before the next forward"
            )

    def _refuse_strangers(self) -> None:
        if self._run.ready and self._run.strangers and not self._run.places:
            kinds = ", ".join(sorted(self._run.strangers))
            raise RuntimeError(
                f"{kinds} has stepped on rank {self._head.comm.rank} since the last backward, but no optimizer holds this head's "
                "anchor, so its class centers are never updated: give head.parameters() to an optimizer, or call head.update"
            )

    def _skips(self) -> bool:
        if self.nonfinite != "auto":
            return self.nonfinite == "skip"
        return _autocast(self.anchor.device.type) == torch.float16

    @contextlib.contextmanager
    def _on_stream(self, head: LibraryHead, *tensors):
        """Runs what is inside on the head's own stream, ordered with the current one."""
        if head.device.ordinal is None:
            yield
            return
        current = torch.cuda.current_stream(head.device.ordinal)
        if current.cuda_stream == head.device.stream:
            yield
            return
        own = torch.cuda.ExternalStream(head.device.stream, device=head.device.ordinal)
        own.wait_stream(current)
        with torch.cuda.stream(own):
            yield
        current.wait_stream(own)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(own)

    # Optimizers.

    def _before_step(self, optimizer) -> None:
        group = self._group_in(optimizer)
        if self._head is not None:
            self._run.rate_watch.look(optimizer, group, self._head.comm.rank)
        if group is None:
            if self._run.ready:
                self._run.strangers.add(type(optimizer).__name__)
            return
        if self._head is None:
            return
        if hasattr(self.anchor, "full_tensor"):
            raise TypeError(
                f"the head's anchor is a DTensor on rank {self._head.comm.rank}: FSDP has taken it into its shards; leave the head out, "
                "fully_shard(backbone), or give fully_shard(model, ignored_params={head.anchor})"
            )
        _hooks.compare(optimizer, group, self.options, self._head.comm.rank)
        self._take_factor(optimizer)

    def _after_step(self, optimizer) -> None:
        group = self._group_in(optimizer)
        if group is None or self._head is None:
            return
        self._take_factor(optimizer)  # A closure's forward and backward were inside the step.
        factor, self._run.factor = self._run.factor, None
        if factor is not None:
            self._update(float(group["lr"]), factor)

    def _take_factor(self, optimizer) -> None:
        """Takes what multiplies the class centers' gradient from the anchor's, which the optimizer then passes over."""
        gradient, self.anchor.grad = self.anchor.grad, None
        if gradient is None:
            return
        # A fused optimizer is called on an overflow, too, and with gradients that are scaled: it looks at these itself.
        found, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        weights = self._run.weights
        if _on_gpu(gradient):
            # Nothing is read here: where it is not finite, the library skips the update.
            if not weights:
                return  # zero_grad(set_to_none=False)
            self._refuse_abandoned()
            self._refuse_unequal_weights()
            factor = gradient / (_UNIT * len(weights))
            if scale is not None:
                factor = factor / scale
            self._run.factor = factor if found is None else torch.where(found != 0, math.nan, factor)
            return
        if found is not None and found.item():
            return
        factor = gradient.item() / _UNIT
        if scale is not None:
            factor /= scale.item()
        if not math.isfinite(factor):
            error = self._run.error
            raise error if error is not None else RuntimeError(
                f"the gradient of the loss is {factor} on rank {self._head.comm.rank}: no optimizer may step then; a GradScaler sees to that"
            )
        if factor == 0.0 and not weights:
            return  # zero_grad(set_to_none=False)
        self._refuse_abandoned()
        # The library has the weights. What has become of them on their way: unscaled, clipped, averaged.
        total = sum(weights)
        self._run.factor = factor / total if total else 1.0

    def _group_in(self, optimizer) -> dict | None:
        """The group of an optimizer that has the anchor."""
        groups = optimizer.param_groups
        place = self._run.places.get(optimizer)
        if place is not None:
            group, index = place
            if group < len(groups) and index < len(groups[group]["params"]) and groups[group]["params"][index] is self.anchor:
                return groups[group]
            del self._run.places[optimizer]
        for group, contents in enumerate(groups):
            for index, parameter in enumerate(contents["params"]):
                if parameter is self.anchor:
                    self._run.places[optimizer] = group, index
                    return contents
        return None

    # Making it, saving it.

    def _made(self, embeddings) -> LibraryHead:
        if self.anchor.dtype != torch.float32:
            raise TypeError(f"the head's anchor is {self.anchor.dtype}; it must be float32: call head.float() after half()")
        if self._head is None:
            self._head = self._make(embeddings.shape[0] if isinstance(embeddings, torch.Tensor) and embeddings.dim() else 0)
            self._take_loaded(self._head.comm)
        return self._head

    def _take_loaded(self, comm: Comm) -> None:
        """What load_state_dict gave before there was a head. Where one rank cannot take it, all go without a head. Collective."""
        failure = None
        try:
            if self._loaded is not None:
                self._restore(self._loaded)
        except (ValueError, TypeError, PartialFCError) as error:
            failure = error
        failed = np.array([-1 if failure is None else comm.rank], np.int64)
        comm.all_reduce(failed, "max")
        if failed[0] < 0:
            self._loaded = None
            return
        self._head = None
        if failure is not None:
            raise failure
        raise PartialFCError(_abi.PFC_ERROR_REMOTE, f"rank {failed[0]} cannot take the state dict that it has loaded", comm.rank)

    def _make(self, rows: int) -> LibraryHead:
        place = self.anchor.device
        if place.type == "cuda":
            index = torch.cuda.current_device() if place.index is None else place.index
            device = Device.cuda(index, torch.cuda.current_stream(index).cuda_stream)
        elif place.type == "cpu":
            device = Device.cpu(torch.get_num_threads())
        else:
            raise TypeError(f"the head's anchor is on {place}; a head is on the CPU or a CUDA GPU")
        comm = _groups.communicator(self._group, place, device) if self._comm is None else self._comm
        if self._timeout is not None:
            comm.set_timeout(self._timeout.total_seconds())
        largest = self._max_batch
        if largest is None and place.type == "cpu":
            largest = 0
        if largest is None:
            found = np.array([max(rows, 1)], np.int64)
            comm.all_reduce(found, "max")
            largest = int(found[0])
        scale = float(comm.size) if self._gradient_scale == "auto" else self._gradient_scale
        given = {**self._given, "max_batch": largest, "gradient_scale": scale}
        head = LibraryHead(device=device, comm=comm, metrics_every=self.metrics_every, **given)
        self.options = head.options
        return head

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self._head is None:
            saved = self._loaded or {}
        else:
            draws, updates = self._head.read_progress()
            first, _ = self._head.shard
            saved = {"weight": self.weight}
            saved.update((name, torch.from_numpy(self._head.read_state(name))) for name in self._head.states)
            saved["progress"] = torch.tensor([draws, updates, first, self.num_classes])
        for name, tensor in saved.items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        known = ("weight", "momentum", "second_moment", "progress")
        found = {name: state_dict[prefix + name].detach() for name in known if prefix + name in state_dict}
        if strict:
            if "weight" not in found:
                missing_keys.append(prefix + "weight")
            others = (key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in known)
            unexpected_keys.extend(key for key in others if key != prefix + "anchor")
        if not found:
            return
        try:
            if self._head is None:
                self._loaded = {name: tensor.clone() for name, tensor in found.items()}
            else:
                self._restore(found)
        except (ValueError, TypeError, PartialFCError) as error:
            error_msgs.append(str(error))

    def _restore(self, saved: dict) -> None:
        """Rows first, then the progress: so the steps that follow have the same bits."""
        head = self._head
        first, count = head.shard
        for name in ("weight", *head.states):
            if name not in saved:
                continue
            rows = saved[name].to("cpu", torch.float32).contiguous()
            if tuple(rows.shape) != (count, self.embedding_dim):
                raise ValueError(
                    f"{name} has shape {tuple(rows.shape)} in the state dict; on rank {head.comm.rank} of {head.comm.size} "
                    f"the head has {(count, self.embedding_dim)}: a state dict is that of one rank of as many"
                )
            head.write_centers(rows) if name == "weight" else head.write_state(rows, name)
        if "progress" in saved:
            draws, updates, saved_first, classes = saved["progress"].tolist()
            if (saved_first, classes) != (first, self.num_classes):
                raise ValueError(
                    f"the state dict is that of classes {saved_first} on of {classes}; rank {head.comm.rank} has {first} on "
                    f"of {self.num_classes}"
                )
            head.write_progress(draws, updates)
        self._forget_step()  # Writing has dropped it.

    # What it has and tells.

    @property
    def num_classes(self) -> int:
        """C, classes over all ranks."""
        return self._num_classes if self._head is None else self._head.num_classes

    # Other classes, once there has been a batch. Collective; not between micro-batches.

    def resize(self, num_classes: int, progress=None) -> None:
        """See `partialfc.Head.resize`."""
        self._between_steps("resize")
        self.rank_head.resize(num_classes, progress)

    def remap(self, class_map, num_classes: int | None = None, progress=None, class_weights=None) -> None:
        """See `partialfc.Head.remap`."""
        self._between_steps("remap")
        self.rank_head.remap(class_map, num_classes, progress, class_weights)

    def merge(self, pairs, progress=None, class_weights=None) -> torch.Tensor:
        """See `partialfc.Head.merge`."""
        self._between_steps("merge")
        return torch.from_numpy(self.rank_head.merge(pairs, progress, class_weights))

    def _between_steps(self, call: str) -> None:
        """Refuses a call while there is a gradient that no optimizer has used, and forgets a step that nothing came of."""
        if self._run.weights:
            # So that no rank waits for this one.
            self.rank_head._refuse(lib.pfc_head_resize, 0, None)
            raise RuntimeError(
                f"{call} comes between a backward and the optimizer's step on rank {self.rank_head.comm.rank}: the gradient is of other classes"
            )
        self._forget_step()

    def _forget_step(self) -> None:
        self._run.ready = self._run.kept = self._run.forwarded = False
        self._run.weights.clear()

    @property
    def rank_head(self) -> LibraryHead:
        """The `partialfc.Head`, once there has been a batch."""
        if self._head is None:
            raise RuntimeError("the head is made with its first batch, and there has been none")
        return self._head

    @property
    def weight(self) -> torch.Tensor:
        """A copy of this rank's class centers, (rows of the shard, d), float32, in host memory."""
        if self._head is None and self._loaded is not None:
            return self._loaded["weight"].clone()
        return torch.from_numpy(self.rank_head.read_centers())

    @property
    def last_metrics(self) -> Metrics | None:
        """What the last update that `metrics_every` names has measured. Not collective: rank 0 alone may log it."""
        return None if self._head is None else self._head.last_metrics

    def metrics(self) -> Metrics:
        """Measurements of the last step. Collective: all ranks must call it, or none; see `last_metrics`."""
        return self.rank_head.metrics()

    @torch.no_grad()
    def top_k(self, embeddings: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, cosines) of the k nearest class centers of all ranks, (rows, k), nearest first. Collective."""
        return self._made(embeddings).top_k(embeddings, k)

    def extra_repr(self) -> str:
        made = "made with its first batch"
        if self._head is not None:
            first, count = self._head.shard
            comm = self._head.comm
            made = f"classes {first} to {first + count - 1} on rank {comm.rank} of {comm.size}"
        scale = self._gradient_scale if self._head is None else self.options["gradient_scale"]
        return (
            f"{self.num_classes} classes x {self.embedding_dim}, {made}, sample_rate={self.options['sample_rate']}, "
            f"optimizer={self.options['optimizer']}, gradient_scale={scale}"
        )
