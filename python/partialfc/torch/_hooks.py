"""What heads hear of optimizers: every `Optimizer.step` of the process, before and after."""

import math
import sys
import warnings
import weakref

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_heads: "weakref.WeakSet" = weakref.WeakSet()
_registered = False
#: Of every `step` that calls hooks.
_HOOKED = Optimizer.profile_hook_step(lambda optimizer: None).__code__


def listen(head) -> None:
    """Calls the head's `_before_step` and `_after_step` from now on."""
    global _registered
    _heads.add(head)
    if not _registered:
        _registered = True
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)


def keep() -> None:
    """Gives optimizers their hooks back, which torch.compile takes from all of torch.optim in torch 2.1."""
    if "torch._dynamo" not in sys.modules or not _has_lost(torch.optim.SGD):
        return
    for kind in tuple(vars(torch.optim).values()):
        if isinstance(kind, type) and issubclass(kind, Optimizer) and "step" in vars(kind) and _has_lost(kind):
            kind.step = Optimizer.profile_hook_step(kind.step)
            kind.step.hooked = True


def _has_lost(kind: type) -> bool:
    """Whether a kind of optimizer is marked as calling hooks, so that it is left as it is, and does not."""
    step = kind.step
    return getattr(step, "hooked", False) and getattr(step, "__code__", _HOOKED) is not _HOOKED


def _before(optimizer, _arguments, _keywords) -> None:
    for head in tuple(_heads):
        head._before_step(optimizer)


def _after(optimizer, _arguments, _keywords) -> None:
    for head in tuple(_heads):
        head._after_step(optimizer)


def compare(optimizer, group: dict, options: dict, rank: int) -> None:
    """Raises where an optimizer does with a group what the head, which has its own, does not do with its rows."""
    # By name: torch's own, and those that wrap or derive from them.
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    if "AdamW" in kinds:
        kind = "adamw"
        theirs = {"beta1": group["betas"][0], "beta2": group["betas"][1], "epsilon": group["eps"]}
        never = ("amsgrad", "maximize")
    elif "SGD" in kinds:
        kind = "sgd"
        theirs = {"momentum": group["momentum"]}
        never = ("dampening", "nesterov", "maximize")
    else:
        raise ValueError(f"the optimizer is {type(optimizer).__name__} on rank {rank}; a head's class centers have SGD or AdamW")
    theirs["optimizer"] = kind
    theirs["weight_decay"] = group["weight_decay"]
    for name, value in theirs.items():
        if options[name] != value:
            remedy = f"make the head with {name}={value!r}, or the optimizer's group with the head's"
            if name in ("momentum", "beta1") and "max_momentum" in group:
                remedy = "a scheduler changes it, and the head's stays: give the scheduler cycle_momentum=False"
            raise ValueError(f"{name} is {value!r} in the optimizer and {options[name]!r} in the head on rank {rank}; {remedy}")
    rate = group["lr"]
    if isinstance(rate, (int, float)) and not 0 <= rate < math.inf:  # A tensor's may be on a GPU: the library looks at it.
        raise ValueError(f"lr is {rate!r} in the optimizer on rank {rank}; it must be a number of at least 0")
    for name in never:
        if group.get(name):
            raise ValueError(f"{name} is {group[name]!r} in the optimizer on rank {rank}; a head's class centers have none")


class RateWatch:
    """Warns once where a scheduler has other groups and not the one with a head's anchor, so that the head's learning rate stays."""

    __slots__ = ("changed", "first_rate", "other_rates")

    def __init__(self):
        #: The anchor's learning rate in its first step; NaN once there has been a warning.
        self.first_rate: float | None = None
        #: The first learning rate of other groups than the anchor's, by optimizer.
        self.other_rates = weakref.WeakKeyDictionary()
        #: The kind of an optimizer of these whose learning rate has changed since.
        self.changed: str | None = None

    def look(self, optimizer, group: dict | None, rank: int) -> None:
        """Looks at an optimizer that is about to step; `group` is its group with the anchor."""
        other = optimizer.param_groups[0]
        if other is not group and isinstance(rate := other.get("lr"), (int, float)):
            if self.other_rates.setdefault(optimizer, rate) != rate:
                self.changed = type(optimizer).__name__
        # Every scheduler but ReduceLROnPlateau leaves its mark on its groups.
        if group is None or "initial_lr" in group or not isinstance(rate := group["lr"], (int, float)):
            return
        if self.first_rate is None:
            self.first_rate, self.changed = rate, None
        elif self.changed is not None and rate == self.first_rate:
            self.first_rate = math.nan
            warnings.warn(
                f"a learning rate of {self.changed} has changed, but lr of the group with the head's anchor is {rate} on rank {rank} "
                "as it was at first, and no scheduler has that group: the class centers are not scheduled",
                RuntimeWarning,
                stacklevel=2,
            )
