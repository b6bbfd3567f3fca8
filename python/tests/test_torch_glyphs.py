"""Fifty steps over images of characters are those of a plain PyTorch PartialFC with the same samples, however one trains."""

import pytest

torch = pytest.importorskip("torch")

from glyphs import glyphs, network  # noqa: E402
from loops import ADAMW, SGD  # noqa: E402
from partialfc.torch import Head  # noqa: E402
from plain import LazyRows, PlainHead  # noqa: E402
from test_row_terms import adaface  # noqa: E402

STEPS, BATCH, DIM = 50, 32, 32


@pytest.fixture(scope="module")
def images():
    return glyphs()


@pytest.fixture(autouse=True)
def one_thread():
    """Such small batches take several threads longer where something else runs beside the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class AdaFace:
    """The margins of each batch's rows, by the norms of the embeddings; the mean and the deviation of the norms run along."""

    def __init__(self):
        self.mean, self.deviation = 1.0, 1.0

    def __call__(self, embeddings):
        norms = embeddings.detach().norm(dim=1)
        self.mean += 0.1 * (norms.mean() - self.mean)
        self.deviation += 0.1 * (norms.std() - self.deviation)
        return adaface(norms, self.mean, self.deviation)


@pytest.mark.parametrize("margins", ["arcface", "adaface"])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("margin_gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("row_update", ["lazy", "dense"])
def test_fifty_steps(images, row_update, kind, margin_gradient, micro_batches, margins):
    pictures, classes_of, classes = images
    scale, m2 = 32.0, 0.3
    options = {"scale": scale, "m2": m2, "optimizer": kind, "row_update": row_update, "margin_gradient": margin_gradient}
    if kind == "adamw":
        options["weight_decay"] = ADAMW["weight_decay"]
    if margins == "adaface":
        options["row_terms"] = "on"
    theirs, more, lr = (torch.optim.SGD, SGD, 0.002) if kind == "sgd" else (torch.optim.AdamW, ADAMW, 2e-3)
    head = Head(classes, DIM, seed=3, sample_rate=0.4, init_std=0.1, max_batch=BATCH, **options)
    net, plain_net = network(DIM), network(DIM)
    own, plain_own = (AdaFace(), AdaFace()) if margins == "adaface" else (lambda _: {}, lambda _: {})
    optimizer = theirs([{"params": net.parameters()}, {"params": head.parameters()}], lr=lr, **more)
    head(torch.ones(BATCH, DIM), torch.arange(BATCH)).detach()  # So that there are start values.
    plain = PlainHead(head.weight, scale, m2, straight_through=margin_gradient == "straight_through")
    plain_optimizer = theirs(plain_net.parameters(), lr=lr, **more)
    plain_rows = LazyRows(plain.weight, theirs, **more) if row_update == "lazy" else theirs([plain.weight], lr=lr, **more)

    numbers = torch.Generator().manual_seed(1)
    losses, farthest = [], 0.0
    for _ in range(STEPS):
        chosen = torch.randint(0, len(pictures), (BATCH,), generator=numbers)
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
        plain.weight.grad = None
        union = set()
        for part in chosen.chunk(micro_batches):
            x, y = pictures[part], classes_of[part]
            embeddings, plain_embeddings = net(x), plain_net(x)
            loss = head(embeddings, y, **own(embeddings))
            (loss / micro_batches).backward()
            sample = torch.from_numpy(head.rank_head.sample_ids())
            union.update(sample.tolist())
            plain_loss = plain(plain_embeddings, y, sample, **plain_own(plain_embeddings))
            (plain_loss / micro_batches).backward()
            losses.append(loss.item())
            farthest = max(farthest, abs(loss.item() / plain_loss.item() - 1))
        optimizer.step()
        plain_optimizer.step()
        if row_update == "lazy":
            plain_rows.step(torch.tensor(sorted(union)), lr)
        else:
            plain_rows.step()
    plain_weight = plain.weight.detach().float()
    apart = ((head.weight - plain_weight).norm() / plain_weight.norm()).item()
    print(f"losses {losses[0]:.3f} to {losses[-1]:.3f}, {farthest:.1e} apart; class centers {apart:.1e} apart")
    assert farthest <= 1e-4
    assert apart <= 1e-4
    assert head.rank_head.read_progress()[1] == STEPS
    assert sum(losses[-5:]) < sum(losses[:5])  # It learns.
