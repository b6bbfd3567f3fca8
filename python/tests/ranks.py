"""One of some ranks over gloo, for test_torch_ranks.py: ranks.py FOLDER MODE.., with what a launcher sets in the environment."""

import datetime
import os
import pathlib
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

import partialfc
from partialfc.torch import DistributedState, Head
from plain import backbone, data

CLASSES, DIM, FEATURES, BATCH = 101, 16, 24, 32
rank = int(os.environ["RANK"])


class Model(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.net = backbone(FEATURES, DIM, seed=rank)  # DDP makes them equal.
        self.head = Head(CLASSES, DIM, seed=3, init_std=0.1, **options)

    def forward(self, x, y):
        return self.head(self.net(x), y)


def rows_of(batch, step):
    """This rank's rows of a batch; on some steps the ranks have different numbers of them."""
    cut = BATCH // 2 if step % 2 == 0 else 20
    mine = slice(0, cut) if rank == 0 else slice(cut, BATCH)
    return batch[0][mine], batch[1][mine]


def train(placement):
    model = Model(placement=placement, max_batch=BATCH, metrics_every=1)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    losses = []
    for step, batch in enumerate(data(20, BATCH, FEATURES, CLASSES)):
        optimizer.zero_grad()
        loss = ddp(*rows_of(batch, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    first, count = model.head.rank_head.shard
    weight = model.head.weight
    # Every replica of the backbone, and of the class centers where they are replicated, has the same bits.
    for tensor in [*model.net.parameters(), *([weight] if placement == "replicated" else [])]:
        others = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(others, tensor.detach().contiguous())
        assert torch.equal(others[0], others[1])
    assert (first, count) == ((0, CLASSES) if placement == "replicated" else ((0, 51), (51, 50))[rank])
    assert "gradient_scale=2.0" in repr(model.head)
    if rank == 0:
        assert model.head.last_metrics.rows == BATCH  # On this rank alone.

    _, alone = train_alone(losses)
    torch.testing.assert_close(weight, alone.weight[first : first + count], rtol=1e-3, atol=1e-4)

    # A state dict of each rank goes on to the bit.
    other = Model(placement=placement, max_batch=BATCH)
    other.load_state_dict(model.state_dict())
    for step, batch in enumerate(data(3, BATCH, FEATURES, CLASSES, seed=1)):
        x, y = rows_of(batch, step)
        assert model(x, y).item() == other(x, y).item()
    return model


def train_alone(losses):
    """(backbone, head) of one rank that trains by itself with the rows of all, to the same losses."""
    net = backbone(FEATURES, DIM, seed=0)
    head = Head(CLASSES, DIM, seed=3, init_std=0.1, comm=partialfc.Comm.self())
    parameters = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    for step, (x, y) in enumerate(data(20, BATCH, FEATURES, CLASSES)):
        optimizer.zero_grad()
        loss = head(net(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        assert abs(loss.item() - losses[step]) <= 1e-4 * losses[step], (step, loss.item(), losses[step])
    return net, head


def shard(which):
    """FSDP2 shards the backbone; the head is left out of it, or its anchor is."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = Model(max_batch=BATCH)
    for parameter in model.net.parameters():
        dist.broadcast(parameter.detach(), 0)  # DDP does so by itself, FSDP does not.
    if which == "backbone":
        fully_shard(model.net, mesh=mesh)
    elif which == "model":
        fully_shard(model, mesh=mesh, ignored_params={model.head.anchor})
    else:
        fully_shard(model, mesh=mesh)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    losses = []
    for step, batch in enumerate(data(20, BATCH, FEATURES, CLASSES)):
        optimizer.zero_grad()
        loss = model(*rows_of(batch, step))
        loss.backward()
        if which == "anchor":
            try:
                optimizer.step()
                raise AssertionError("no error")
            except TypeError as error:
                assert f"the head's anchor is a DTensor on rank {rank}" in str(error), error
                return
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        losses.append(loss.item())
    net, head = train_alone(losses)
    for mine, other in zip(model.net.parameters(), net.parameters()):
        assert isinstance(mine, torch.distributed.tensor.DTensor)
        torch.testing.assert_close(mine.full_tensor(), other, rtol=1e-3, atol=1e-4)
    first, count = model.head.rank_head.shard
    torch.testing.assert_close(model.head.weight, head.weight[first : first + count], rtol=1e-3, atol=1e-4)


def refuse(model):
    """What is wrong on one rank is an error on both, and the heads remain usable."""
    x, y = rows_of(next(data(1, BATCH, FEATURES, CLASSES)), 0)
    embeddings = x[:, :DIM].contiguous()
    before = model.head(embeddings, y).item()
    wrong = y.clone()
    wrong[2] = -7
    for labels, mine, others in (
        (wrong, "PFC_ERROR_LABEL", "PFC_ERROR_LABEL"),
        (y.int(), "labels is torch.int32 on rank 1", "PFC_ERROR_REMOTE"),
    ):
        try:
            model.head(embeddings, labels if rank == 1 else y)
            raise AssertionError("no error")
        except (partialfc.PartialFCError, TypeError) as error:
            assert (mine if rank == 1 else others) in str(error), error
            assert "rank 1" in str(error), error
    assert model.head(embeddings, y).item() == before


def checkpoint(folder, mode):
    """Saves a head after some steps, or loads it into one that has had none, or one; then prints the losses of five steps.

    save-PLACEMENT, or load-PLACEMENT-PLACEMENT: what was saved, and the head that loads it.
    """
    import torch.distributed.checkpoint as dcp

    verb, saved, *loads = mode.split("-")
    placement, kept = (loads or [saved])[0], folder / saved
    size = dist.get_world_size()
    head = Head(CLASSES, DIM, placement=placement, optimizer="adamw", weight_decay=0.01, scale=16.0, m2=0.3, max_batch=BATCH)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    batches = list(data(8, BATCH, DIM, CLASSES))

    def step(batch):
        optimizer.zero_grad()
        loss = head(*(part.tensor_split(size)[rank].contiguous() for part in batch))
        loss.backward()
        optimizer.step()
        return loss.item()

    state = DistributedState(head)
    if verb == "save":
        for batch in batches[:3]:
            step(batch)
        dcp.save({"head": state}, checkpoint_id=kept)
    else:
        if placement == "replicated":
            step(batches[7])
        dcp.load({"head": state}, checkpoint_id=kept)
        mine = head.state_dict()
    losses = [step(batch) for batch in batches[3:]]
    assert head.rank_head.read_progress() == (8, 8)
    print("losses", mode, *losses, flush=True)
    if loads and size == 3:
        rows = (CLASSES + 2 - rank) // 3 if placement == "sharded" else CLASSES
        assert mine["second_moment"].shape == (rows, DIM) and mine["second_moment"].any()
        # What is not of the checkpoint's size is named.
        try:
            dcp.load({"head": DistributedState(Head(CLASSES + 1, DIM, optimizer="adamw"))}, checkpoint_id=kept)
            raise AssertionError("no error")
        except dcp.api.CheckpointException as error:
            assert "[102, 16]" in str(error) and "head.weight" in str(error), error


def interrupt(folder):
    """Rank 1 comes to no second step before rank 0 has been interrupted in it."""
    head = Head(CLASSES, DIM)
    head(torch.ones(4, DIM), torch.arange(4))
    interrupted = folder / "interrupted"
    if rank == 1:
        while not interrupted.exists():
            time.sleep(0.05)
        return

    def kill():
        while not head.rank_head.comm._waiting:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=kill, daemon=True).start()
    try:
        head(torch.ones(4, DIM), torch.arange(4))
    except KeyboardInterrupt:
        interrupted.touch()
        print("interrupted", flush=True)
        return
    raise AssertionError("not interrupted")


def lose():
    """Rank 1 ends; rank 0 learns of it."""
    head = Head(CLASSES, DIM, timeout=datetime.timedelta(seconds=60))
    head(torch.ones(4, DIM), torch.arange(4))
    if rank == 1:
        os._exit(0)
    try:
        head(torch.ones(4, DIM), torch.arange(4))
    except partialfc.PartialFCError as error:
        print(f"{error} from {error.__cause__!r}", flush=True)
        os._exit(0)
    raise AssertionError("no error")


def main():
    # What a shell runs in the background ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = pathlib.Path(sys.argv[1])
    for mode in sys.argv[2:]:
        if mode == "interrupt":
            interrupt(folder)
        elif mode == "lose":
            lose()
        elif mode.startswith("fsdp "):
            shard(mode.split()[1])
            print(mode, "as it should be", flush=True)
        elif "-" in mode:
            checkpoint(folder, mode)
        else:
            refuse(train(mode))
            print(mode, "as it should be", flush=True)
    # Ends gloo's threads: one that frees a tensor while Python ends would abort the process.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
