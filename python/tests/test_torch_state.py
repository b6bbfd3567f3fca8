"""What is saved of a `partialfc.torch.Head`, and loaded on as many ranks or others."""

import copy
import sys

import pytest

torch = pytest.importorskip("torch")

import partialfc  # noqa: E402
from partialfc.torch import DistributedState, Head, PartialFC_V2, reshard  # noqa: E402
from conftest import on_ranks  # noqa: E402
from loops import BATCH, CLASSES, DIM, FEATURES, SGD, Margin, loop, make, rows, same  # noqa: E402
from plain import backbone, data  # noqa: E402


@pytest.mark.parametrize("row_update", ["lazy", "dense"])
@pytest.mark.parametrize("before_the_first_batch", [True, False])
def test_a_state_dict_goes_on_to_the_bit(row_update, before_the_first_batch, tmp_path):
    head = make(row_update=row_update)
    net, optimizer, _ = loop(head)
    torch.save({"head": head.state_dict(), "net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "all.pt")
    saved = torch.load(tmp_path / "all.pt", weights_only=True)
    other = make(row_update=row_update)
    x, y = next(data(1, BATCH, FEATURES, CLASSES))
    if not before_the_first_batch:
        other(x[:, :DIM], y)
    other.load_state_dict(saved["head"])
    assert same(rows(other), saved["head"])
    again = backbone(FEATURES, DIM)
    again.load_state_dict(saved["net"])
    resumed = torch.optim.SGD([{"params": again.parameters()}, {"params": other.parameters()}], lr=0.05, **SGD)
    resumed.load_state_dict(saved["optimizer"])
    for x, y in data(3, BATCH, FEATURES, CLASSES, seed=8):
        losses = []
        for model, module, steps in ((net, head, optimizer), (again, other, resumed)):
            steps.zero_grad()
            loss = module(model(x), y)
            loss.backward()
            steps.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    assert same(rows(head), rows(other))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_four_ranks_go_on_as_three(kind):
    classes, batches = 10, list(data(6, 24, DIM, 10))

    def run(comm, steps, state=None):
        head = Head(classes, DIM, comm=comm, seed=3, init_std=0.1, optimizer=kind, gradient_scale=1.0, max_batch=24)
        if state is not None:
            head.load_state_dict(state)
        losses = []
        for x, y in steps:
            mine = slice(comm.rank * len(x) // comm.size, (comm.rank + 1) * len(x) // comm.size)
            loss = head(x[mine], y[mine])
            loss.backward()
            head.update(0.02)
            losses.append(loss.item())
        return losses, rows(head)

    states = [state for _, state in on_ranks(lambda comm: run(comm, batches[:3]), 4)]
    assert [len(state["weight"]) for state in states] == [3, 3, 2, 2]
    expected = on_ranks(lambda comm: run(comm, batches), 4)[0][0][3:]
    told = on_ranks(lambda comm: run(comm, batches[3:], reshard(states, comm.rank, 3)), 3)
    assert [len(state["weight"]) for _, state in told] == [4, 3, 3]
    assert told[0][0] == pytest.approx(expected, rel=1e-6)
    for wrong in (states[:3], states[::-1], [states[0], *states[:3]]):
        with pytest.raises(ValueError, match="give those of all ranks"):
            reshard(wrong, 0, 3)
    with pytest.raises(ValueError, match="rank is 3; it must be 0 to 2"):
        reshard(states, 3, 3)


def test_a_state_dict_of_another_rank_is_an_error_on_all():
    """As where all ranks load what rank 0 has saved, before the first batch."""
    x, y = next(data(1, BATCH, DIM, CLASSES))

    def run(comm):
        saved = make(comm=comm)
        saved(x, y)
        right = saved.state_dict()
        head = make(comm=comm)
        wrong = {name: tensor.clone() for name, tensor in right.items()}
        wrong["progress"][2] = 0  # Rank 0's.
        head.load_state_dict(wrong, strict=False)
        texts = []
        for _ in range(2):
            with pytest.raises((ValueError, partialfc.PartialFCError)) as caught:
                head(x, y)
            texts.append(str(caught.value))
        head.load_state_dict(right, strict=False)
        assert head(x, y).item() == saved(x, y).item()
        return texts

    zero, one = on_ranks(run)
    assert zero == ["rank 1 cannot take the state dict that it has loaded [PFC_ERROR_REMOTE, rank 0]"] * 2
    assert one == ["the state dict is that of classes 0 on of 100; rank 1 has 50 on of 100"] * 2


def test_the_state_dict_of_insightface():
    weight = torch.randn(CLASSES, DIM)
    head = PartialFC_V2(Margin(), DIM, CLASSES)
    head.load_state_dict({"weight": weight})
    x, y = next(data(1, BATCH, FEATURES, CLASSES))
    head(x[:, :DIM], y)
    assert torch.equal(head.weight, weight)
    with pytest.raises(RuntimeError, match=r"weight has shape \(7, 16\) in the state dict; on rank 0 of 1 the head has \(100, 16\)"):
        head.load_state_dict({"weight": weight[:7]})
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        head.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key.*bias"):
        head.load_state_dict({"weight": weight, "bias": weight})


def test_a_copy_before_the_first_batch():
    head = make()
    copied = copy.deepcopy(head)
    loop(head)
    loop(copied)
    assert same(rows(head), rows(copied)) and copied.rank_head is not head.rank_head
    with pytest.raises(TypeError, match="a head cannot be copied or pickled"):
        copy.deepcopy(head)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_of_one_process(tmp_path):
    """Without torch.distributed. test_torch_ranks.py has several ranks."""
    import torch.distributed.checkpoint as dcp

    head = make()
    loop(head)
    dcp.save({"head": DistributedState(head)}, checkpoint_id=tmp_path / "made", no_dist=True)
    other = make()
    dcp.load({"head": DistributedState(other)}, checkpoint_id=tmp_path / "made", no_dist=True)
    assert loop(other, seed=1)[2] == loop(head, seed=1)[2]
    assert same(rows(other), rows(head))

    # Class centers alone, as insightface saves them, are a head with no momentum yet.
    alone, from_alone = make(), make()
    alone.load_state_dict({"weight": head.weight}, strict=False)
    dcp.save({"head": DistributedState(alone)}, checkpoint_id=tmp_path / "alone", no_dist=True)
    dcp.load({"head": DistributedState(from_alone)}, checkpoint_id=tmp_path / "alone", no_dist=True)
    assert loop(from_alone)[2] == loop(alone)[2]

    dcp.save({"head": DistributedState(make())}, checkpoint_id=tmp_path / "unmade", no_dist=True)
    with pytest.raises(ValueError, match="the checkpoint is that of a head before its first batch"):
        dcp.load({"head": DistributedState(make())}, checkpoint_id=tmp_path / "unmade", no_dist=True)


def test_what_a_distributed_checkpoint_refuses(monkeypatch):
    from partialfc.torch import _checkpoint

    with pytest.raises(ValueError, match="the head has comm"):
        DistributedState(make(comm=partialfc.Comm.self()))
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor._shards_wrapper", None)
    monkeypatch.setattr(_checkpoint._groups, "ranks", lambda group: (None, 0, 2))
    with pytest.raises(RuntimeError, match="has no LocalShardsWrapper.*partialfc.torch.reshard"):
        DistributedState(make())
    DistributedState(make(placement="replicated"))
