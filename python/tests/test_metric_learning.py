"""The head in the place of pytorch-metric-learning's ArcFaceLoss: the same losses, and the same class centers after steps."""

import math

import pytest

torch = pytest.importorskip("torch")
losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")

from partialfc.torch import Head  # noqa: E402
from plain import backbone, data  # noqa: E402

CLASSES, DIM, FEATURES, BATCH = 50, 16, 24, 32
SGD = {"momentum": 0.9, "weight_decay": 5e-4}


def test_five_steps_are_those_of_arcface_loss():
    degrees, scale = 28.6, 32.0
    head = Head(
        CLASSES, DIM, sample_rate=1.0, m2=math.radians(degrees), scale=scale, margin_gradient="exact", row_update="dense", seed=3, **SGD
    )
    theirs = losses.ArcFaceLoss(CLASSES, DIM, margin=degrees, scale=scale)
    with torch.no_grad():
        theirs.W.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    head.load_state_dict({"weight": theirs.W.detach().T}, strict=False)
    start = theirs.W.detach().clone()

    sides = []
    for loss_func in (head, theirs):
        net = backbone(FEATURES, DIM)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, **SGD)
        loss_optimizer = torch.optim.SGD(loss_func.parameters(), lr=0.05, **SGD)
        values = []
        for x, y in data(5, BATCH, FEATURES, CLASSES):
            optimizer.zero_grad()
            loss_optimizer.zero_grad()
            loss = loss_func(net(x), y)
            loss.backward()
            optimizer.step()
            loss_optimizer.step()
            values.append(loss.item())
        sides.append((values, net))

    assert sides[0][0] == pytest.approx(sides[1][0], rel=1e-4)
    assert (theirs.W.detach() - start).norm() / start.norm() > 0.01  # The steps have changed something.
    assert (head.weight - theirs.W.detach().T).norm() / start.norm() < 1e-4
    for ours, other in zip(sides[0][1].parameters(), sides[1][1].parameters()):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-5)
    # And a margin that is not the same is seen.
    other = Head(CLASSES, DIM, m2=math.radians(degrees + 1), scale=scale)
    other.load_state_dict({"weight": start.T}, strict=False)
    x, y = next(data(1, BATCH, FEATURES, CLASSES))
    embeddings = backbone(FEATURES, DIM)(x).detach()
    assert other(embeddings, y).item() != pytest.approx(sides[1][0][0], rel=1e-4)
