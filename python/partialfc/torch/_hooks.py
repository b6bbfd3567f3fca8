"""What heads hear of optimizers: every `Optimizer.step` of the process, before and after."""

import math
import sys
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
