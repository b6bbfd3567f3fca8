"""The usual loop of PyTorch around a head, for the tests of partialfc.torch."""

import torch

from partialfc.torch import Head
from plain import backbone, data

CLASSES, DIM, FEATURES, BATCH = 100, 16, 24, 32
SGD = {"momentum": 0.9, "weight_decay": 5e-4}
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def make(**options) -> Head:
    return Head(CLASSES, DIM, **{"seed": 3, "sample_rate": 0.4, "init_std": 0.1, **options})


def loop(head, steps=3, lr=0.05, seed=0):
    """(backbone, optimizer, head) after some steps of the usual loop."""
    net = backbone(FEATURES, DIM)
    optimizer = torch.optim.SGD([{"params": net.parameters()}, {"params": head.parameters()}], lr=lr, **SGD)
    losses = []
    for x, y in data(steps, BATCH, FEATURES, CLASSES, seed):
        optimizer.zero_grad()
        loss = head(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return net, optimizer, losses


def rows(head):
    """All there is of a head, to be compared bit by bit."""
    return {name: tensor.clone() for name, tensor in head.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Margin:
    """The attributes of insightface's CombinedMarginLoss."""

    def __init__(self, s=64.0, m1=1.0, m2=0.5, m3=0.0, interclass_filtering_threshold=0):
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold
