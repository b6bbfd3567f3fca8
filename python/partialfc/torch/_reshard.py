"""State dicts of one number of ranks as those of another."""

import torch

_ROWS = ("weight", "momentum", "second_moment")


def shard(classes: int, rank: int, ranks: int) -> tuple[int, int]:
    """(first, count) of a rank's classes. The first ranks own one class more, as insightface has it, too."""
    return rank * (classes // ranks) + min(rank, classes % ranks), classes // ranks + (rank < classes % ranks)


def reshard(state_dicts: list[dict], rank: int, ranks: int) -> dict:
    """The state dict of one of `ranks` ranks, from those of all the ranks that saved, in their order.

    For heads with placement="sharded". Steps go on with the samples of the new shards; with sample_rate 1 the losses
    are those of the old ranks up to rounding.

    Args:
        state_dicts: `head.state_dict()` of every rank that saved.
        rank: the rank to load it, 0 to ranks - 1.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank is {rank}; it must be 0 to {ranks - 1}")
    progress = [saved["progress"].tolist() for saved in state_dicts]
    classes, expected = progress[0][3], 0
    for saver, (saved, (draws, updates, first, of)) in enumerate(zip(state_dicts, progress)):
        if (first, of) != (expected, classes) or (draws, updates) != tuple(progress[0][:2]):
            raise ValueError(
                f"state dict {saver} is that of classes {first} on of {of} after {updates} updates; expected were classes "
                f"{expected} on of {classes} after {progress[0][1]}: give those of all ranks, of one time, in their order"
            )
        expected += len(saved["weight"])
    if expected != classes:
        raise ValueError(f"the state dicts have {expected} of {classes} classes: give those of all ranks")
    first, count = shard(classes, rank, ranks)
    found = {
        name: torch.cat([saved[name] for saved in state_dicts])[first : first + count].clone() for name in _ROWS if name in state_dicts[0]
    }
    return {**found, "progress": torch.tensor([*progress[0][:2], first, classes])}
