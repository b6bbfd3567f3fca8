"""Margins and weights of the rows' own: the losses that come of them, against plain NumPy and plain PyTorch."""

import numpy as np
import pytest

import partialfc
from conftest import CLASSES, DIM, batch, make, on_ranks


def naive(weight, embeddings, labels, m2, m3, weights, scale=64.0):
    """The mean loss over all classes, in float64."""
    w, e = weight.astype(np.float64), embeddings.astype(np.float64)
    cosines = (e / np.linalg.norm(e, axis=1, keepdims=True)) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
    rows = np.arange(len(e))
    logits = scale * cosines
    angle = np.maximum(np.arccos(cosines[rows, labels]) + m2, 0)
    logits[rows, labels] = scale * (np.cos(angle) - m3)
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[rows, labels]
    return (weights * losses).mean()


def terms(rows: int, seed: int = 0):
    numbers = np.random.default_rng(100 + seed)
    return (
        numbers.uniform(-0.3, 0.6, rows).astype(np.float32),
        numbers.uniform(0, 0.4, rows).astype(np.float32),
        numbers.uniform(0, 2, rows).astype(np.float32),
    )


def test_a_loss_and_its_gradients_are_the_naive_ones():
    embeddings, labels = batch()
    m2, m3, weight = terms(6)
    with make(row_terms="on") as head:
        centers = head.read_centers()
        told = head.forward(embeddings, labels, m2=m2, m3=m3, weight=weight)
        assert told == pytest.approx(naive(centers, embeddings, labels, m2, m3, weight), rel=1e-5)
        grad_m2, grad_m3 = np.empty(6, np.float32), np.empty(6, np.float32)
        head.backward(loss_weight=0.5, loss_scale=4.0, grad_m2=grad_m2, grad_m3=grad_m3)
        for index in range(6):
            for given, found in ((0, grad_m2), (1, grad_m3)):
                losses = []
                for by in (1e-5, -1e-5):
                    moved = [m2.astype(np.float64), m3.astype(np.float64)]
                    moved[given][index] += by
                    losses.append(naive(centers, embeddings, labels, *moved, weight))
                slope = (losses[0] - losses[1]) / 2e-5
                assert found[index] == pytest.approx(2.0 * slope, rel=1e-3, abs=1e-4)


def test_terms_may_be_left_out_and_differ_between_ranks():
    embeddings, labels = batch(8)
    m2, _, weight = terms(8)

    def one(comm):
        half = slice(4 * comm.rank, 4 * comm.rank + 4)
        own = {"m2": m2[half]} if comm.rank else {"weight": weight[half]}
        with make(comm=comm, row_terms="on", seed=3) as head:
            head.prepare(labels[half])
            return head.forward(embeddings[half], **own)

    with make(row_terms="on", seed=3) as head:
        centers = head.read_centers()
    both = naive(
        centers,
        embeddings,
        labels,
        np.concatenate([np.full(4, 0.5), m2[4:]]),
        0.0,
        np.concatenate([weight[:4], np.ones(4)]),
    )
    for told in on_ranks(one):
        assert told == pytest.approx(both, rel=1e-5)


def test_wrong_terms_are_named(head):
    embeddings, labels = batch()
    good = np.zeros(6, np.float32)
    with pytest.raises(partialfc.PartialFCError, match="m2 must be NULL for a head without row_terms"):
        head.forward(embeddings, labels, m2=good)
    with make(row_terms="on") as own:
        for given, kind, text in (
            ({"m2": np.zeros(5, np.float32)}, ValueError, "m2 has 5 elements on rank 0; it must have 6"),
            ({"m3": np.zeros(6)}, TypeError, "m3 is float64 on rank 0; it must be float32"),
            ({"weight": good[::2]}, ValueError, "weight"),
            ({"weight": good - 1}, partialfc.PartialFCError, r"weight\[0\] must be a finite float32 of at least 0, got -1.0"),
        ):
            with pytest.raises(kind, match=text):
                own.forward(embeddings, labels, **given)
        own.forward(embeddings, labels)
        with pytest.raises(TypeError, match="grad_m2 is float64"):
            own.backward(grad_m2=np.zeros(6))


def test_a_wrong_array_on_one_rank_is_an_error_on_both():
    embeddings, labels = batch()

    def one(comm):
        with make(comm=comm, row_terms="on") as head:
            try:
                head.forward(embeddings, labels, m2=np.zeros(6, np.float32 if comm.rank else np.float64))
            except (TypeError, partialfc.PartialFCError) as error:
                told = error
            return type(told), head.forward(embeddings, labels)

    (first, loss), (second, other) = on_ranks(one)
    assert (first, second) == (TypeError, partialfc.PartialFCError)
    assert loss == other


# Losses of papers, each a few lines of a trainer's, against a plain writing with autograd.

torch = pytest.importorskip("torch")


def adaface(norms, mean, deviation, m=0.4, h=0.333):
    """2204.00964: a margin by the quality of an image, for which its embedding's norm stands."""
    quality = ((norms - mean) / (deviation + 1e-3) * h).clamp(-1, 1).detach()
    return {"m2": -m * quality, "m3": m * quality + m}


def magface(norms, least=1.0, most=5.0, low=0.45, high=0.8):
    """2103.06627: a margin that grows with the norm; its gradient goes into the norm."""
    return {"m2": low + (high - low) * (norms.clamp(least, most) - least) / (most - least)}


def elasticface(rows, kind="m2", mean=0.5, deviation=0.0125):
    """2109.09416: a margin drawn anew for each row."""
    return {kind: torch.normal(mean, deviation, (rows,), generator=torch.Generator().manual_seed(1))}


def class_balanced(labels, counts, beta=0.999):
    """1901.05555: a weight by the effective number of a class's examples; their mean over the classes is 1."""
    of_class = (1 - beta) / (1 - beta**counts)
    return {"weight": (of_class / of_class.mean())[labels]}


def plain_loss(weight, embeddings, labels, m2=None, m3=None, weights=None, scale=64.0):
    """The same in plain PyTorch, for autograd."""
    cosines = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(weight).T
    index = torch.arange(len(labels))
    zeros = torch.zeros(len(labels), dtype=torch.float64)
    angle = cosines[index, labels].arccos() + (zeros + 0.5 if m2 is None else m2.double())
    target = angle.clamp(min=0).cos() - (zeros if m3 is None else m3.double())
    losses = torch.nn.functional.cross_entropy(cosines.index_put((index, labels), target) * scale, labels, reduction="none")
    return (losses * (1 if weights is None else weights.double())).mean()


@pytest.mark.parametrize("paper", ["adaface", "magface", "elasticface arc", "elasticface cos", "class-balanced"])
def test_papers_are_a_few_lines(paper):
    embeddings, labels = batch(12)
    embeddings, labels = torch.from_numpy(embeddings), torch.from_numpy(labels)
    counts = torch.bincount(labels, minlength=CLASSES) + 3.0

    def terms_of(x):
        norms = x.norm(dim=1)
        match paper:
            case "adaface":
                return adaface(norms, norms.mean().detach(), norms.std().detach())
            case "magface":
                return magface(norms)
            case "elasticface arc":
                return elasticface(len(x))
            case "elasticface cos":
                return elasticface(len(x), "m3", 0.35)
        return class_balanced(labels, counts)

    from partialfc.torch import Head

    m2 = 0.0 if paper == "elasticface cos" else 0.5
    head = Head(CLASSES, DIM, row_terms="on", momentum=0.0, weight_decay=0.0, m2=m2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.0)
    own = embeddings.clone().requires_grad_()
    loss = head(own, labels, **terms_of(own))
    before = head.weight
    (2 * loss).backward()
    optimizer.step()

    weight = before.double().requires_grad_()
    theirs = embeddings.double().requires_grad_()
    given = terms_of(theirs)
    if m2 == 0.0:
        given["m2"] = torch.zeros(12)
    expected = plain_loss(weight, theirs, labels, given.get("m2"), given.get("m3"), given.get("weight"))
    (2 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    scale = theirs.grad.abs().max().item()
    np.testing.assert_allclose(own.grad.numpy(), theirs.grad.numpy(), atol=2e-5 * scale)
    moved = (before - head.weight).numpy() / 0.1
    np.testing.assert_allclose(moved, weight.grad.numpy(), atol=1e-4 * weight.grad.abs().max().item())


def test_learned_margins_and_mixed_types():
    """A margin for each class, in float16 here, which an optimizer trains."""
    from partialfc.torch import Head

    embeddings, labels = (torch.from_numpy(x) for x in batch(12))
    head = Head(CLASSES, DIM, row_terms="on")
    margins = torch.full((CLASSES,), 0.35, dtype=torch.float16, requires_grad=True)
    loss = head(embeddings, labels, m3=margins[labels])
    loss.backward()
    assert margins.grad.dtype == torch.float16
    assert (margins.grad[labels.unique()] > 0).all() and margins.grad.count_nonzero() == len(labels.unique())
    with pytest.raises(ValueError, match="weight requires a gradient on rank 0"):
        head(embeddings, labels, weight=torch.ones(12, requires_grad=True))
    assert head(embeddings, labels, weight=torch.ones(12)).item() > 0
