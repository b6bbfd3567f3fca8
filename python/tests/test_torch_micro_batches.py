"""Several backwards before a step, and backwards that no step uses."""

import copy

import pytest

torch = pytest.importorskip("torch")

import partialfc  # noqa: E402
from loops import ADAMW, BATCH, CLASSES, DIM, FEATURES, SGD, make, same  # noqa: E402
from plain import LazyRows, PlainHead, backbone, data  # noqa: E402


@pytest.mark.parametrize("row_update", ["lazy", "dense"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_accumulation_is_autograds(row_update, kind):
    """Micro-batches of several sizes and weights, with different samples, clipped and unscaled before one step."""
    options = {"optimizer": kind, "row_update": row_update, "scale": 32.0, "m2": 0.3}
    if kind == "adamw":
        options["weight_decay"] = 0.01
    theirs, more, lr = (torch.optim.SGD, SGD, 0.05) if kind == "sgd" else (torch.optim.AdamW, ADAMW, 2e-3)
    head, net, plain_net = make(max_batch=BATCH, **options), backbone(FEATURES, DIM), backbone(FEATURES, DIM)
    optimizer = theirs([*net.parameters(), *head.parameters()], lr=lr, **more)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    head(torch.zeros(BATCH, DIM) + 1, torch.arange(BATCH)).detach()  # So that there are start values.
    plain = PlainHead(head.weight, 32.0, 0.3)
    plain_optimizer = theirs(plain_net.parameters(), lr=lr, **more)
    plain_rows = LazyRows(plain.weight, theirs, **more) if row_update == "lazy" else theirs([plain.weight], lr=lr, **more)
    for x, y in data(8, BATCH, FEATURES, CLASSES):
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
        plain.weight.grad = None
        union = set()
        for part, labels, weight in zip(x.split([16, 8, 4, 4]), y.split([16, 8, 4, 4]), [0.5, 0.25, 0.125, 0.125]):
            loss = weight * head(net(part), labels)
            scaler.scale(loss).backward()
            sample = torch.from_numpy(head.rank_head.sample_ids())
            union.update(sample.tolist())
            plain_loss = weight * plain(plain_net(part), labels, sample)
            plain_loss.backward()
            assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-4)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([*net.parameters(), *head.parameters()], 2.0)
        scaler.step(optimizer)
        scaler.update()
        norm = torch.nn.utils.clip_grad_norm_(plain_net.parameters(), 2.0)
        if norm > 2.0:  # The head's gradient is clipped with the backbone's.
            plain.weight.grad.mul_(2.0 / (norm + 1e-6))
        plain_optimizer.step()
        if row_update == "lazy":
            plain_rows.step(torch.tensor(sorted(union)), lr)
        else:
            plain_rows.step()
    assert head.rank_head.read_progress()[1] == 8
    assert len(union) > len(sample)
    difference = (head.weight - plain.weight.detach().float()).norm() / plain.weight.detach().norm()
    assert difference < 1e-4


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The way of a GPU, which reads no tensor, with tensors in host memory."""
    monkeypatch.setattr("partialfc.torch._head._on_gpu", lambda tensor: True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gpus_way_is_the_same_training(monkeypatch, fused):
    """Weights of losses, micro-batches, clipping, a scaler, and an overflow in the second step."""
    heads = []
    for on_gpu in (False, True):
        monkeypatch.setattr("partialfc.torch._head._on_gpu", lambda tensor, on_gpu=on_gpu: on_gpu)
        head, net = make(nonfinite="skip", sample_rate=1.0, max_batch=BATCH), backbone(FEATURES, DIM)
        optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, fused=fused, **SGD)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step, (x, y) in enumerate(data(5, BATCH, FEATURES, CLASSES)):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            parts = 1 if step == 3 else 4
            for micro, (part, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts))):
                spoiled = torch.inf if (step, micro) == (1, 2) else 1.0
                scaler.scale(0.7 / parts * head(net(part) * spoiled, labels)).backward()
            if not fused:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_([*net.parameters(), *head.parameters()], 2.0)
            scaler.step(optimizer)
            scaler.update()
        assert head.rank_head.read_progress()[1] == 4
        heads.append(head)
    torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=1e-4, atol=1e-6)


def test_what_a_gpus_way_refuses(as_on_a_gpu):
    head, net = make(max_batch=BATCH), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
    (x, y), (other, labels) = data(2, BATCH, FEATURES, CLASSES)
    head(net(x), y).backward()
    (0.5 * head(net(other), labels)).backward()
    with pytest.raises(RuntimeError, match=r"have the weights \[1.0, 0.5\] on rank 0; on a GPU they must be equal"):
        optimizer.step()
    optimizer.zero_grad()
    (0.5 * head(net(x), y)).backward()
    head.update(0.05, factor=2.0)
    head(net(x), y).backward()
    head(net(other), labels)
    with pytest.raises(RuntimeError, match="a forward on rank 0 follows the backward whose step this is"):
        optimizer.step()
    assert head.rank_head.read_progress()[1] == 1


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("between", [False, True])
def test_what_an_overflow_leaves_of_micro_batches_is_dropped(to_none, between):
    """The scaler leaves a step out, with a forward for a look at the loss before the gradients are zeroed, or without."""
    heads = []
    for overflows in (True, False):
        head, net = make(nonfinite="skip"), backbone(FEATURES, DIM)
        optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        batches = list(data(4, BATCH, FEATURES, CLASSES))
        head(torch.ones(BATCH, DIM), torch.arange(BATCH)).detach()  # So that there is a head.
        for step in range(2):
            if step == 0 and not overflows:
                continue
            for micro, (x, y) in enumerate(batches[2 * step : 2 * step + 2]):
                embeddings = net(x) * (torch.inf if step == 0 and micro == 1 else 1.0)
                sample = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(2 * step + micro))[:40].sort().values
                head.rank_head.set_sample(sample)
                scaler.scale(head(embeddings, y)).backward()
            scaler.step(optimizer)
            scaler.update()
            if between:
                with torch.no_grad():
                    head(net(batches[0][0]), batches[0][1])
            optimizer.zero_grad(set_to_none=to_none)
        assert head.rank_head.read_progress()[1] == 1
        heads.append(head)
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_a_batch_that_is_refused_among_micro_batches():
    heads = []
    for refused in (True, False):
        head, net = make(sample_rate=1.0), backbone(FEATURES, DIM)
        optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
        batches = list(data(2, BATCH, FEATURES, CLASSES))
        for x, y in batches:
            head(net(x), y).backward()
        if refused:
            with pytest.raises(partialfc.PartialFCError, match="LABEL"):
                head(net(batches[0][0]), batches[0][1] + CLASSES)
        optimizer.step()
        assert head.rank_head.read_progress()[1] == 1
        heads.append(head)
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_one_call_of_the_head_over_micro_batches():
    """The recipe of docs/pytorch.md: the same as one large batch."""
    (x, y), nets, heads = next(data(1, BATCH, FEATURES, CLASSES)), [], []
    for micro in (False, True):
        head, net = make(), backbone(FEATURES, DIM)
        optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
        if micro:
            parts = x.split(8)
            with torch.no_grad():
                embeddings = torch.cat([net(part) for part in parts])
            embeddings.requires_grad_()
            head(embeddings, y).backward()
            for part, gradient in zip(parts, embeddings.grad.split(8)):
                net(part).backward(gradient)
        else:
            head(net(x), y).backward()
        optimizer.step()
        nets.append(net)
        heads.append(head)
    torch.testing.assert_close(heads[0].weight, heads[1].weight)
    torch.testing.assert_close(nets[0][0].weight, nets[1][0].weight)


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_was_abandoned_is_no_accumulation(to_none):
    head, net = make(), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
    for step, (x, y) in enumerate(data(4, BATCH, FEATURES, CLASSES)):
        loss = head(net(x), y)
        optimizer.zero_grad(set_to_none=to_none)
        loss.backward()
        if step % 2:
            optimizer.step()
    assert head.rank_head.read_progress() == (4, 2)


def test_a_forward_between_backward_and_step():
    head, net = make(), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
    (x, y), (other, labels) = data(2, BATCH, FEATURES, CLASSES)
    head(net(x), y).backward()
    head(net(other), labels)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="a forward on rank 0 follows the backward whose step this is"):
        optimizer.step()
    assert same(net.state_dict(), before)


def test_a_backward_of_an_earlier_forward():
    head, net = make(), backbone(FEATURES, DIM)
    (x, y), (other, labels) = data(2, BATCH, FEATURES, CLASSES)
    first = head(net(x), y)
    head(net(other), labels)
    with pytest.raises(RuntimeError, match="this is the backward of forward 1 on rank 0, which forward 2 has abandoned"):
        first.backward()
