"""Schedulers: which learning rate a head gets, and what one does with groups that are not the head's."""

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")

from loops import ADAMW, BATCH, CLASSES, DIM, FEATURES, SGD, make, rows, same  # noqa: E402
from plain import backbone, data  # noqa: E402
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, PolynomialLR, ReduceLROnPlateau  # noqa: E402


def train(net, head, optimizers, schedulers=(), steps=3):
    """The anchor's learning rates."""
    rates = []
    for x, y in data(steps, BATCH, FEATURES, CLASSES):
        for optimizer in optimizers:
            optimizer.zero_grad()
        head(net(x).detach(), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        rates.append(optimizers[-1].param_groups[-1]["lr"])
        for scheduler in schedulers:
            scheduler.step()
    return rates


def one_optimizer(net, head, **of_the_head):
    return torch.optim.SGD([{"params": net.parameters()}, {"params": head.parameters(), **of_the_head}], lr=0.05, **SGD)


def test_each_group_has_its_own_schedule():
    head, net = make(), backbone(FEATURES, DIM)
    optimizer = one_optimizer(net, head, lr=0.04)
    rates = train(net, head, [optimizer], [LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5**step])])
    assert rates == [0.04, 0.02, 0.01]
    direct, net = make(), backbone(FEATURES, DIM)
    for (x, y), rate in zip(data(3, BATCH, FEATURES, CLASSES), rates):
        direct(net(x).detach(), y).backward()
        direct.update(rate)
    assert same(rows(head), rows(direct))


OF_ADAMW = {"optimizer": "adamw", "weight_decay": 0.01}
CYCLES = [
    ("momentum is 0.95 in the optimizer and 0.9 in the head on rank 0; a scheduler changes it", {}, SGD, OneCycleLR),
    ("beta1 is 0.95 in the optimizer and 0.9 in the head on rank 0; a scheduler changes it", OF_ADAMW, ADAMW, OneCycleLR),
    ("momentum is 0.8[0-9]* in the optimizer and 0.9 in the head .*: give the scheduler cycle_momentum=False", {}, SGD, CyclicLR),
]


@pytest.mark.parametrize(("text", "options", "more", "scheduler"), CYCLES, ids=["one cycle", "one cycle, AdamW", "cyclic"])
def test_a_scheduler_that_changes_the_momentum(text, options, more, scheduler):
    kind = torch.optim.AdamW if options else torch.optim.SGD
    head, net = make(**options), backbone(FEATURES, DIM)
    optimizer = kind([*net.parameters(), *head.parameters()], lr=0.05, **more)
    arguments = {"max_lr": 0.1, "total_steps": 10} if scheduler is OneCycleLR else {"base_lr": 0.01, "max_lr": 0.1}
    with pytest.raises(ValueError, match=text):
        train(net, head, [optimizer], [scheduler(optimizer, **arguments)])
    # The head is usable, and such a scheduler of the learning rate alone is right.
    optimizer = kind([*net.parameters(), *head.parameters()], lr=0.05, **more)
    updates = head.rank_head.read_progress()[1]
    rates = train(net, head, [optimizer], [scheduler(optimizer, **arguments, cycle_momentum=False)])
    assert len(set(rates)) == 3 and head.rank_head.read_progress()[1] == updates + 3


@pytest.mark.parametrize("rate", [-0.5, float("nan"), float("inf")])
def test_a_rate_that_is_none(rate):
    head, net = make(), backbone(FEATURES, DIM)
    optimizer = one_optimizer(net, head)
    LambdaLR(optimizer, [lambda step: 1.0, lambda step: rate / 0.05])
    x, y = next(data(1, BATCH, FEATURES, CLASSES))
    head(net(x), y).backward()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=f"lr is {rate} in the optimizer on rank 0"):
        optimizer.step()
    assert same(net.state_dict(), before)
    optimizer.param_groups[1]["lr"] = 0.05
    optimizer.step()
    assert head.rank_head.read_progress() == (1, 1)


NOT_SCHEDULED = "a learning rate of SGD has changed, but lr of the group with the head's anchor is 0.05 on rank 0"


@pytest.mark.parametrize("scheduler", [lambda it: PolynomialLR(it, 10), lambda it: OneCycleLR(it, 0.1, total_steps=10)])
@pytest.mark.parametrize("head_first", [False, True])
def test_a_scheduler_of_another_optimizer(scheduler, head_first):
    """Which may be meant, so that it is a warning."""
    head, net = make(), backbone(FEATURES, DIM)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.05, **SGD) for module in (net, head)]
    with pytest.warns(RuntimeWarning, match=NOT_SCHEDULED) as told:
        train(net, head, optimizers[::-1] if head_first else optimizers, [scheduler(optimizers[0])], steps=5)
    assert len(told) == 1


def test_a_scheduler_that_does_not_know_of_the_anchors_group():
    """As older versions of PyTorch let schedulers pass over groups that they have not seen."""
    head, net = make(), backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, **SGD)
    optimizer.add_param_group({"params": list(head.parameters()), "lr": 0.05})

    class First:
        def step(self):
            optimizer.param_groups[0]["lr"] *= 0.5

    with pytest.warns(RuntimeWarning, match=NOT_SCHEDULED):
        train(net, head, [optimizer], [First()])


def test_what_is_no_reason_to_warn():
    def both(net, head, *schedulers):
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.05, **SGD) for module in (net, head)]
        return optimizers, [make(optimizer) for make, optimizer in zip(schedulers, optimizers)]

    class Plateau(ReduceLROnPlateau):
        def step(self):
            super().step(1.0)

    ways = (
        lambda net, head: both(net, head),
        lambda net, head: both(net, head, lambda it: PolynomialLR(it, 10), lambda it: PolynomialLR(it, 20)),
        lambda net, head: both(net, head, lambda it: PolynomialLR(it, 10), lambda it: LambdaLR(it, lambda step: 1.0)),
        lambda net, head: both(net, head, *2 * [lambda it: Plateau(it, patience=0)]),
        lambda net, head: ([one := one_optimizer(net, head)], [PolynomialLR(one, 10)]),
    )
    for way in ways:
        head, net = make(), backbone(FEATURES, DIM)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(net, head, *way(net, head))
