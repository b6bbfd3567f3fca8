"""A head's state as torch.distributed.checkpoint saves it on one number of ranks and loads it on another."""

import torch

from ..head import state_names
from . import _groups
from ._head import Head
from ._reshard import shard

#: Draws and updates of a head that has neither.
_NONE = -1


class DistributedState:
    """A head's state for `torch.distributed.checkpoint`, whose `Stateful` it is.

    `dcp.save({"head": DistributedState(head)}, checkpoint_id=folder)` on all ranks of the head's process group, and
    the same with `dcp.load` on any number of ranks, before or after the head's first batch. With sample_rate 1 the
    losses that follow are those of the old ranks up to rounding; else steps go on with the samples of the new shards.
    Both placements can be saved, and either loads what the other has saved.

    Args:
        head: a head on a process group, or on one process without torch.distributed.

    Raises:
        ValueError: the head has a communicator of its caller's.
        RuntimeError: this version of torch lacks what tells it of shards of uneven sizes.
    """

    def __init__(self, head: Head):
        if head._comm is not None:
            raise ValueError(
                "the head has comm, a communicator given by its caller; torch.distributed.checkpoint needs a process group"
            )
        self._head = head
        # The ranks come first: without torch.distributed a head is whole.
        self._group, self._rank, self._ranks = _groups.ranks(head._group)
        self._sharded = head.options["placement"] == "sharded" and self._ranks > 1
        if self._sharded:
            _wrapper()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Rows of class centers and of the optimizer's state, and the counts of draws and updates.

        Collective only where `head.state_dict` is.
        """
        head = self._head
        saved = head.state_dict()
        # Before the first batch there is what was loaded, or nothing, of which a load wants the shapes.
        progress = saved.get("progress", torch.tensor([0, 0] if "weight" in saved else [_NONE, _NONE]))
        _, count = self._shard()
        none = torch.zeros(count, head.embedding_dim)
        names = ("weight", *state_names(head.options["optimizer"]))
        found = {name: self._spread(saved[name] if name in saved else none.clone()) for name in names}
        return {**found, "progress": progress[:2].clone()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Takes what `state_dict` has given and a load has filled."""
        rows = {name: _local(tensor) for name, tensor in state_dict.items() if name != "progress"}
        first, _ = self._shard()
        draws, updates = state_dict["progress"].tolist()
        if draws == _NONE:
            raise ValueError("the checkpoint is that of a head before its first batch: there is nothing in it to load")
        rows["progress"] = torch.tensor([draws, updates, first, self._head.num_classes])
        self._head.load_state_dict(rows, strict=False)

    def _shard(self) -> tuple[int, int]:
        return shard(self._head.num_classes, self._rank, self._ranks) if self._sharded else (0, self._head.num_classes)

    def _spread(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's rows as a part of all. A tensor of every rank is saved once as it is."""
        if not self._sharded:
            return rows
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        # DTensor's own split is that of torch.chunk; the wrapper has offsets of its own.
        first, _ = self._shard()
        whole = torch.Size((self._head.num_classes, self._head.embedding_dim))
        local = _wrapper()([rows], [(first, 0)])
        mesh = DeviceMesh.from_group(self._group, "cpu")
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole, stride=(whole[1], 1))


def _wrapper():
    """The class that tells torch.distributed.checkpoint of a shard: torch's own, though not a documented one."""
    try:
        from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
    except ImportError as error:
        raise RuntimeError(
            f"torch {torch.__version__} has no LocalShardsWrapper, with which torch.distributed.checkpoint saves shards of uneven "
            "sizes: save head.state_dict() of each rank, and load it on another number of ranks with partialfc.torch.reshard"
        ) from error
    return LocalShardsWrapper


def _local(tensor: torch.Tensor) -> torch.Tensor:
    if not hasattr(tensor, "to_local"):
        return tensor
    (rows,) = tensor.to_local().local_shards()
    return rows
