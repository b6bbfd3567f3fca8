"""`partialfc.torch` beside a plain PyTorch head, and what loops of PyTorch do with a module."""

import copy
import sys

import pytest

torch = pytest.importorskip("torch")

import partialfc  # noqa: E402
from partialfc.torch import PartialFC_V2  # noqa: E402
from loops import ADAMW, BATCH, CLASSES, DIM, FEATURES, SGD, Margin, loop, make, rows, same  # noqa: E402
from plain import LazyRows, PlainHead, backbone, data  # noqa: E402


@pytest.mark.parametrize("row_update", ["lazy", "dense"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("margin_gradient", ["exact", "straight_through"])
def test_fifty_steps_are_those_of_a_plain_head(row_update, kind, margin_gradient):
    """With PolynomialLR, weights of the loss and clipping, each of which reaches the head by the optimizer alone."""
    options = {"optimizer": kind, "row_update": row_update, "margin_gradient": margin_gradient, "scale": 32.0, "m2": 0.3}
    if kind == "adamw":
        options["weight_decay"] = 0.01
    lr = 0.05 if kind == "sgd" else 2e-3
    theirs, more = (torch.optim.SGD, SGD) if kind == "sgd" else (torch.optim.AdamW, ADAMW)
    head = make(**options)
    ours = backbone(FEATURES, DIM)
    plain_net = backbone(FEATURES, DIM)
    optimizer = theirs([{"params": ours.parameters()}, {"params": head.parameters()}], lr=lr, **more)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=60)
    head(torch.zeros(BATCH, DIM) + 1, torch.arange(BATCH)).detach()  # So that there are start values.
    plain = PlainHead(head.weight, 32.0, 0.3, straight_through=margin_gradient == "straight_through")
    plain_optimizer = theirs(plain_net.parameters(), lr=lr, **more)
    plain_rows = LazyRows(plain.weight, theirs, **more) if row_update == "lazy" else theirs([plain.weight], lr=lr, **more)

    losses = []
    for step, (x, y) in enumerate(data(50, BATCH, FEATURES, CLASSES)):
        weight = 0.7 if step % 3 == 0 else 1.0
        rate = optimizer.param_groups[1]["lr"]
        optimizer.zero_grad()
        loss = head(ours(x), y)
        (weight * loss).backward()
        sample = torch.from_numpy(head.rank_head.sample_ids())
        norm = torch.nn.utils.clip_grad_norm_(list(ours.parameters()) + list(head.parameters()), 5.0)
        optimizer.step()
        scheduler.step()

        plain_optimizer.zero_grad()
        plain.weight.grad = None
        plain_loss = plain(plain_net(x), y, sample)
        (weight * plain_loss).backward()
        plain_norm = torch.nn.utils.clip_grad_norm_(plain_net.parameters(), 5.0)
        if plain_norm > 5.0:  # The head's gradient is clipped with the backbone's.
            plain.weight.grad.mul_(5.0 / (plain_norm + 1e-6))
        for group in [*plain_optimizer.param_groups, *getattr(plain_rows, "param_groups", [])]:
            group["lr"] = rate
        plain_optimizer.step()
        if row_update == "lazy":
            plain_rows.step(sample, rate)
        else:
            plain_rows.step()
        assert norm.item() == pytest.approx(plain_norm.item(), rel=1e-3)
        losses.append((loss.item(), plain_loss.item()))
    assert losses[-1][0] < losses[0][0]
    for ours_loss, plain_loss in losses:
        assert ours_loss == pytest.approx(plain_loss, rel=1e-4)
    difference = (head.weight - plain.weight.detach().float()).norm() / plain.weight.detach().norm()
    assert difference < 1e-4


def test_the_weights_of_losses_and_of_clipping_were_there():
    """The test above would notice a lost weight."""
    runs = []
    for weight in (1.0, 0.7):
        head, net = make(), backbone(FEATURES, DIM)
        optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
        for x, y in data(3, BATCH, FEATURES, CLASSES):
            optimizer.zero_grad()
            (weight * head(net(x).detach(), y)).backward()
            optimizer.step()
        runs.append(head.weight)
    assert (runs[0] - runs[1]).norm() / runs[0].norm() > 1e-2


def test_a_loss_may_be_changed_in_place():
    heads = []
    for in_place in (True, False):
        head, net = make(), backbone(FEATURES, DIM)
        optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
        for x, y in data(3, BATCH, FEATURES, CLASSES):
            optimizer.zero_grad()
            loss = head(net(x), y)
            if in_place:
                loss *= 0.7
            else:
                loss = loss * 0.7
            loss.backward()
            optimizer.step()
        heads.append(head)
    assert same(*map(rows, heads))


def test_the_anchor_is_no_part_of_a_norm():
    head, net = make(), backbone(FEATURES, DIM)
    x, y = next(data(1, BATCH, FEATURES, CLASSES))
    head(net(x), y).backward()
    with_anchor = torch.nn.utils.clip_grad_norm_([*net.parameters(), *head.parameters()], 1e9)
    assert with_anchor.item() == torch.nn.utils.clip_grad_norm_(net.parameters(), 1e9).item() > 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("where", ["backbone", "embeddings"])
def test_an_overflow_leaves_the_head_as_it_was(fused, unscale, where):
    head, net = make(nonfinite="skip"), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, fused=fused, **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batches = list(data(4, BATCH, FEATURES, CLASSES))
    reference, reference_net = make(), backbone(FEATURES, DIM)
    reference_optimizer = torch.optim.SGD([*reference_net.parameters(), *reference.parameters()], lr=0.05, **SGD)
    for step, (x, y) in enumerate(batches):
        before, backbone_before = (rows(head) if step else None), copy.deepcopy(net.state_dict())
        overflow = step == 2
        optimizer.zero_grad()
        embeddings = net(x)
        if overflow and where == "embeddings":
            embeddings = embeddings * torch.inf
        loss = head(embeddings, y)
        scaler.scale(loss).backward()
        if overflow and where == "backbone":
            net[0].weight.grad[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            after = rows(head)
            # A draw is not an update: the sample of the step that was left out is used up.
            assert after["progress"][1] == before["progress"][1]
            assert all(torch.equal(after[name], before[name]) for name in ("weight", "momentum"))
            assert same(net.state_dict(), backbone_before)
            assert scaler.get_scale() == 512.0
            assert loss.isnan().item() == (where == "embeddings")
            reference.rank_head.write_progress(after["progress"][0].item(), after["progress"][1].item())
        else:
            reference_optimizer.zero_grad()
            expected = reference(reference_net(x), y)
            expected.backward()
            reference_optimizer.step()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(head.weight, reference.weight, rtol=1e-5, atol=1e-7)


def test_an_overflow_in_a_loop_of_insightface():
    """With all that its train_v2.py has beside: a schedule, clipping at 5, two groups, gradients that are zeroed after the step."""
    head, net = PartialFC_V2(Margin(m2=0.3), DIM, CLASSES, 0.4, seed=3, init_std=0.1), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD([{"params": net.parameters()}, {"params": head.parameters()}], lr=0.1, **SGD)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=20, power=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024, growth_interval=100)
    losses, norms = [], []
    for step, (x, y) in enumerate(data(20, BATCH, FEATURES, CLASSES)):
        loss = head(net(x), y)
        before = [tensor.clone() for tensor in [*net.parameters(), *rows(head).values()]]
        scaler.scale(loss).backward()
        if step == 8:
            net[0].weight.grad[3, 1] = torch.inf
        scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 5).item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
        after = [*net.parameters(), *rows(head).values()]
        assert [torch.equal(*pair) for pair in zip(before, after)] == len(before) * [step == 8]
        losses.append(loss.item())
    assert scaler.get_scale() == 512 and head.rank_head.read_progress() == (20, 19)
    assert sum(losses[-5:]) < sum(losses[:5]) and min(norms) > 5


def test_scaling_alone_changes_no_bit():
    head, net = make(), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    for x, y in data(3, BATCH, FEATURES, CLASSES):
        optimizer.zero_grad()
        scaler.scale(head(net(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    plain = make()
    loop(plain)
    assert same(rows(head), rows(plain))


def test_nan_without_a_scaler():
    x, y = next(data(1, BATCH, FEATURES, CLASSES))
    head, net = make(), backbone(FEATURES, DIM)
    with pytest.raises(partialfc.PartialFCError, match="NOT_FINITE"):
        head(net(x) * torch.nan, y)
    head = make(nonfinite="skip")
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
    before = copy.deepcopy(net.state_dict())
    head(net(x) * torch.nan, y).backward()
    with pytest.raises(partialfc.PartialFCError, match="NOT_FINITE"):
        optimizer.step()
    assert same(net.state_dict(), before)
    # It goes on.
    optimizer.zero_grad()
    head(net(x), y).backward()
    optimizer.step()


def test_autocast_to_half_skips_of_itself():
    x, y = next(data(1, BATCH, FEATURES, CLASSES))
    head = make()
    with torch.autocast("cpu", dtype=torch.float16):
        assert head(x[:, :DIM] * torch.inf, y).isnan()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(partialfc.PartialFCError):
        head(x[:, :DIM] * torch.inf, y)


def test_bfloat16_embeddings_of_autocast():
    head, net = make(), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
    for x, y in data(2, BATCH, FEATURES, CLASSES):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = net(x)
        assert embeddings.dtype == torch.bfloat16
        head(embeddings, y).backward()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
        optimizer.step()
    assert head.rank_head.read_progress() == (2, 2)


def test_a_closure():
    head, net = make(), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
    for x, y in data(3, BATCH, FEATURES, CLASSES):

        def closure():
            optimizer.zero_grad()
            loss = head(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    plain = make()
    loop(plain)
    assert same(rows(head), rows(plain))


def test_an_optimizer_of_the_heads_own():
    """As pytorch-metric-learning has its losses."""
    head, net = make(), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, **SGD)
    loss_optimizer = torch.optim.SGD(head.parameters(), lr=0.05, **SGD)
    for x, y in data(3, BATCH, FEATURES, CLASSES):
        optimizer.zero_grad()
        loss_optimizer.zero_grad()
        head(net(x), y).backward()
        optimizer.step()
        loss_optimizer.step()
    plain = make()
    loop(plain)
    assert same(rows(head), rows(plain))


def test_the_learning_rate_is_that_of_the_anchors_group():
    heads = []
    for rates in ({"lr": 0.05}, {"lr": torch.tensor(0.05)}):
        head = make()
        optimizer = torch.optim.SGD([{"params": head.parameters(), **rates}], lr=9.0, **SGD)
        x, y = next(data(1, BATCH, FEATURES, CLASSES))
        head(x[:, :DIM], y).backward()
        optimizer.step()
        heads.append(head)
    direct = make()
    direct(x[:, :DIM], y).backward()
    direct.update(0.05)
    assert same(rows(heads[0]), rows(direct))
    torch.testing.assert_close(heads[1].weight, direct.weight)


def test_two_heads_and_a_weighted_sum():
    one, two, net = make(), make(seed=4), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD([*net.parameters(), *one.parameters(), *two.parameters()], lr=0.05, **SGD)
    for x, y in data(2, BATCH, FEATURES, CLASSES):
        optimizer.zero_grad()
        embeddings = net(x)
        (one(embeddings, y) + 0.5 * two(embeddings, y)).backward()
        optimizer.step()
    assert one.rank_head.read_progress()[1] == two.rank_head.read_progress()[1] == 2


def test_an_optimizer_that_does_not_hold_the_anchor():
    head, net = make(), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, **SGD)
    (x, y), (other, labels) = data(2, BATCH, FEATURES, CLASSES)
    head(net(x), y).backward()
    optimizer.step()
    head.zero_grad()
    with pytest.raises(RuntimeError, match="SGD has stepped on rank 0 .* no optimizer holds this head's anchor"):
        head(net(other), labels)


DIFFERENT = [
    (torch.optim.SGD, {"momentum": 0.8, "weight_decay": 5e-4}, {}, "momentum is 0.8 in the optimizer and 0.9 in the head on rank 0"),
    (torch.optim.SGD, {"momentum": 0.9}, {}, "weight_decay is 0 in the optimizer and 0.0005 in the head"),
    (torch.optim.SGD, {**SGD, "nesterov": True}, {}, "nesterov is True in the optimizer"),
    (torch.optim.AdamW, {"weight_decay": 5e-4}, {}, "optimizer is 'adamw' in the optimizer and 'sgd' in the head"),
    (torch.optim.AdamW, {"betas": (0.9, 0.98)}, {"optimizer": "adamw", "weight_decay": 0.01}, "beta2 is 0.98 in the optimizer"),
    (torch.optim.AdamW, {"amsgrad": True}, {"optimizer": "adamw", "weight_decay": 0.01}, "amsgrad is True in the optimizer"),
    (torch.optim.RMSprop, {}, {}, "the optimizer is RMSprop on rank 0"),
]


@pytest.mark.parametrize(("kind", "more", "options", "text"), DIFFERENT, ids=[text[:30] for *_, text in DIFFERENT])
def test_an_optimizer_that_does_something_else(kind, more, options, text):
    head, net = make(**options), backbone(FEATURES, DIM)
    optimizer = kind([*net.parameters(), *head.parameters()], lr=0.05, **more)
    x, y = next(data(1, BATCH, FEATURES, CLASSES))
    head(net(x), y).backward()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=text):
        optimizer.step()
    assert same(net.state_dict(), before)


def test_a_head_in_a_model():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = backbone(FEATURES, DIM), make()

        def forward(self, x, y):
            return self.head(self.net(x), y)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **SGD)
    losses = []
    for x, y in data(3, BATCH, FEATURES, CLASSES):
        optimizer.zero_grad()
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == loop(make())[2]
    assert {"head.weight", "head.momentum", "head.progress", "net.0.weight"} <= model.state_dict().keys()
    other = Model()
    other.load_state_dict(model.state_dict())
    with pytest.raises(TypeError, match="a head cannot be copied or pickled"):
        copy.deepcopy(model)


def test_compile():
    head, net = make(), torch.compile(backbone(FEATURES, DIM), backend="eager")
    compiled = torch.compile(head, backend="eager")
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
    losses = []
    for x, y in data(3, BATCH, FEATURES, CLASSES):
        optimizer.zero_grad()
        loss = compiled(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == loop(make())[2]


def test_metrics_and_neighbors():
    head = make(metrics_every=1, sample_rate=1.0)
    assert head.last_metrics is None
    net, _, losses = loop(head)
    assert head.last_metrics.loss == pytest.approx(losses[-1]) and head.last_metrics.updates == 3
    assert head.metrics() == head.last_metrics
    weight = torch.nn.functional.normalize(head.weight)
    ids, cosines = head.top_k(weight[:5], 2)
    assert ids[:, 0].tolist() == [0, 1, 2, 3, 4] and cosines.shape == (5, 2)
    assert "100 classes x 16, classes 0 to 99 on rank 0 of 1" in repr(head)


REFUSED = [
    (lambda e, y: (e, y.int()), TypeError, "labels is torch.int32 on rank 0; it must be int64"),
    (lambda e, y: (e, y.float()), TypeError, "labels is torch.float32 on rank 0"),
    (lambda e, y: (e.double(), y), TypeError, "embeddings is torch.float64 on rank 0; it must be float32"),
    (lambda e, y: (e.to("meta"), y), TypeError, "embeddings is on device meta on rank 0"),
    (lambda e, y: (e, y.to("meta")), TypeError, "labels is on device meta on rank 0"),
    (lambda e, y: (e.t().contiguous().t(), y), ValueError, "embeddings has rows that are not contiguous on rank 0"),
    (lambda e, y: (e, y[:-1]), ValueError, "labels has 31 rows on rank 0; it must have 32"),
    (lambda e, y: (e.to_sparse(), y), TypeError, "embeddings is a tensor of layout torch.sparse_coo"),
    (lambda e, y: (e, y - 200), partialfc.PartialFCError, r"labels\[0\] must be 0 to 99 or ignore_label"),
]


@pytest.mark.parametrize(("change", "kind", "text"), REFUSED, ids=[text[:30] for *_, text in REFUSED])
def test_refused(change, kind, text):
    head = make()
    x, y = next(data(1, BATCH, FEATURES, CLASSES))
    embeddings = x[:, :DIM].contiguous()
    head(embeddings, y).backward()
    head.update(0.1)
    with pytest.raises(kind, match=text):
        head(*change(embeddings, y))
    head(embeddings, y).backward()
    head.update(0.1)
    assert head.rank_head.read_progress()[1] == 2


def test_other_classes():
    head, net = make(), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1, **SGD)

    def train(classes):
        for x, y in data(3, BATCH, FEATURES, classes):
            optimizer.zero_grad()
            head(net(x), y).backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match="made with its first batch"):
        head.resize(CLASSES + 1)
    train(CLASSES)
    before = head.weight
    head.resize(CLASSES + 4)
    assert head.num_classes == CLASSES + 4 and torch.equal(head.weight[:CLASSES], before)
    assert head.state_dict()["progress"][3] == CLASSES + 4
    train(CLASSES + 4)
    moved = head.merge({0: 1})
    assert moved.tolist() == [0, *range(CLASSES + 3)] and head.num_classes == CLASSES + 3
    head.remap(torch.arange(CLASSES + 3).flip(0))
    train(CLASSES + 3)
    # Between a backward and the optimizer's step there is a gradient of the classes as they are.
    optimizer.zero_grad()
    x, y = next(iter(data(1, BATCH, FEATURES, CLASSES)))
    head(net(x), y).backward()
    with pytest.raises(RuntimeError, match="resize comes between a backward and the optimizer's step on rank 0"):
        head.resize(CLASSES)
    optimizer.step()
    head(net(x), y)  # A forward that nothing comes of.
    head.resize(CLASSES)
    train(CLASSES)


def test_a_head_that_has_been_closed():
    head, net = make(), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05, **SGD)
    x, y = next(data(1, BATCH, FEATURES, CLASSES))
    head(net(x), y).backward()
    head.rank_head.close()
    for call in (optimizer.step, lambda: head(net(x), y), head.state_dict, lambda: head.top_k(net(x), 1)):
        with pytest.raises(partialfc.PartialFCError, match=r"this head has been closed \[PFC_ERROR_INVALID_ARGUMENT, rank 0"):
            call()


def test_wrong_options():
    for options, text in (
        ({"tempo": 1}, "tempo is no option of a head"),
        ({"nonfinite": "yes"}, "nonfinite is 'yes'"),
        ({"gradient_scale": "none"}, "gradient_scale is 'none'"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            make(**options)
    with pytest.raises(RuntimeError, match="there has been none"):
        make().weight
    with pytest.raises(TypeError, match="the head's anchor is torch.float16"):
        make().half()(torch.zeros(2, DIM), torch.arange(2))


def test_a_process_group_that_is_not_initialized(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2 on rank 1, but torch.distributed is not initialized"):
        make()(torch.zeros(2, DIM), torch.arange(2))
    make(comm=partialfc.Comm.self())(torch.ones(2, DIM), torch.arange(2))


def test_insightfaces_margins():
    arc = PartialFC_V2(Margin(), DIM, CLASSES, 0.3, False).options
    assert (arc["scale"], arc["m1"], arc["m2"], arc["m3"]) == (64.0, 1.0, 0.5, 0.0)
    assert (arc["margin_gradient"], arc["row_update"], arc["sample_rate"]) == ("straight_through", "dense", 0.3)
    cos = PartialFC_V2(Margin(m2=0.5, m3=0.4, interclass_filtering_threshold=0.2), DIM, CLASSES).options
    assert (cos["m1"], cos["m2"], cos["m3"], cos["interclass_filter"]) == (1.0, 0.0, 0.4, 0.2)
    with pytest.raises(ValueError, match="m1 is 1.3 in margin_loss"):
        PartialFC_V2(Margin(m1=1.3), DIM, CLASSES)
    with pytest.raises(TypeError, match="margin_loss is a function without s, m1, m2, m3"):
        PartialFC_V2(lambda logits, labels: logits, DIM, CLASSES)


def test_hooks_keep_no_head():
    import gc
    import weakref

    head = make()
    loop(head)
    alive = weakref.ref(head.rank_head)
    del head
    gc.collect()
    assert alive() is None


def test_hooks_that_were_taken_come_back(monkeypatch):
    """As torch.compile takes them in torch 2.1: from every optimizer of torch.optim, and for good."""
    plain = make()
    loop(plain)
    taken = torch.optim.SGD.step.__wrapped__
    monkeypatch.setattr(torch.optim.SGD, "step", taken)
    monkeypatch.setattr(taken, "hooked", True, raising=False)
    monkeypatch.setitem(sys.modules, "torch._dynamo", sys.modules.get("torch._dynamo"))
    head = make()
    loop(head)
    assert same(rows(head), rows(plain)) and head.rank_head.read_progress()[1] > 0


def test_later_batches_may_be_larger():
    head, fixed = make(), make(max_batch=3 * BATCH)
    for rows, (x, y) in zip((BATCH, 3 * BATCH, 1, 2 * BATCH), data(4, 3 * BATCH, FEATURES, CLASSES)):
        of = [each(x[:rows, :DIM].contiguous(), y[:rows]) for each in (head, fixed)]
        assert of[0].item() == of[1].item()
        for each, loss in zip((head, fixed), of):
            loss.backward()
            each.update(0.1)
    with pytest.raises(ValueError, match="a batch of 97 rows on rank 0 is beyond max_batch, which is 96"):
        fixed(torch.ones(97, DIM), torch.zeros(97, dtype=torch.int64))
