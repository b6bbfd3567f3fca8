"""The ranks of a process group as a communicator of the library's."""

import datetime
import os

import torch
import torch.distributed as dist

from ..comm import Comm, nccl_unique_id
from ..device import Device

_OPS = {"sum": "SUM", "max": "MAX"}


def ranks(group):
    """(group, rank, size) of a process group; None means all ranks or, without torch.distributed, this one alone."""
    if dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD if group is None else group
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the group that it makes a head on")
        return group, rank, dist.get_world_size(group)
    launched = os.environ.get("WORLD_SIZE", "1")
    if group is not None or launched != "1":
        why = "group is given" if group is not None else f"WORLD_SIZE is {launched}"
        raise RuntimeError(
            f"{why} on rank {os.environ.get('RANK', '0')}, but torch.distributed is not initialized: call init_process_group "
            "before the head's first batch, or give comm=partialfc.Comm.self() for a head of this process alone"
        )
    return None, 0, 1


def communicator(group, device: torch.device, library_device: Device) -> Comm:
    """A communicator of the head's own, so that its messages never mix with those of DDP. Collective."""
    group, rank, size = ranks(group)
    if size == 1:
        return Comm.self()
    if device.type == "cuda" and "nccl" in _backend(group, device):
        box = [nccl_unique_id() if rank == 0 else None]
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
        return Comm.nccl(box[0], rank, size, library_device)
    if dist.get_world_size() == size:
        own = dist.new_group(backend="gloo")
    else:
        own = dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)
    return over_gloo(own)


def _backend(group, device: torch.device) -> str:
    """Such as "gloo"; a group may have one for each kind of device: "cpu:gloo,cuda:nccl"."""
    backend = str(dist.get_backend(group))
    for pair in backend.split(","):
        kind, _, name = pair.partition(":")
        if kind == device.type and name:
            return name
    return backend


class _Waiting:
    """Waits for a group's operations, of which gloo's cannot be ended: what ends is the wait.

    Python aborts a process that ends while one of gloo's threads waits for the interpreter. So no callback tells of
    an operation's end, and the last operation is kept: otherwise the thread that ran it may be the last to hold its
    tensors, which are objects of Python.
    """

    SLICE = datetime.timedelta(seconds=0.1)

    def __init__(self):
        self.aborted = False
        self.last = None

    def abort(self) -> None:
        self.aborted = True

    def end(self, work) -> None:
        self.last = work
        while not self.aborted:
            try:
                work.wait(self.SLICE)
            except RuntimeError:
                if not work.is_completed():
                    continue
                work.wait()  # Raises what went wrong.
            return
        raise RuntimeError("the communicator was aborted while it waited for other ranks")


def over_gloo(group) -> Comm:
    """The ranks of a group that carries host memory. The group must be the communicator's alone."""
    waiting = _Waiting()

    # In tensors of their own: an operation whose wait has been aborted may still write to its memory.
    def all_gather(send, recv):
        own, blocks = torch.from_numpy(send).clone(), torch.empty(recv.shape, dtype=torch.uint8)
        waiting.end(dist.all_gather(list(blocks), own, group=group, async_op=True))
        recv[:] = blocks.numpy()

    def all_reduce(send, recv, op):
        own = torch.from_numpy(send).clone()
        waiting.end(dist.all_reduce(own, getattr(dist.ReduceOp, _OPS[op]), group=group, async_op=True))
        recv[:] = own.numpy()

    return Comm.custom(dist.get_rank(group), dist.get_world_size(group), all_gather, all_reduce, abort=waiting.abort)
