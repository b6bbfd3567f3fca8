"""Lightning's Trainer over a module with a head: automatic optimization, clipping, a schedule, a checkpoint."""

import logging

import pytest

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from partialfc.torch import Head  # noqa: E402
from plain import backbone, data  # noqa: E402

CLASSES, DIM, FEATURES, BATCH, STEPS = 60, 16, 24, 32, 12
CLIP = 0.5
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def schedule(optimizer):
    return torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=STEPS)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = backbone(FEATURES, DIM)
        self.head = Head(CLASSES, DIM, sample_rate=0.5, scale=32.0, init_std=0.1, seed=3)
        self.losses = []

    def training_step(self, batch, _index):
        x, y = batch
        loss = self.head(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([{"params": self.net.parameters()}, {"params": self.head.parameters()}], **SGD)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}


def fit(module, steps, folder=None, **more):
    """Trains up to a count of steps; a checkpoint of the last goes to the folder."""
    # One epoch has half the steps.
    batches = torch.utils.data.DataLoader(list(data(STEPS // 2, BATCH, FEATURES, CLASSES)), batch_size=None)
    callbacks = [] if folder is None else [ModelCheckpoint(folder, filename="saved", every_n_train_steps=steps)]
    lightning.Trainer(
        max_steps=steps,
        gradient_clip_val=CLIP,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, batches, **more)
    return module


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.WARNING, logger="lightning.pytorch")


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_automatic_optimization_is_the_loop_written_out():
    module = fit(Module(), STEPS)

    net, head = backbone(FEATURES, DIM), Module().head
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], **SGD)
    scheduler = schedule(optimizer)
    losses, norms = [], []
    for _epoch in range(2):
        for x, y in data(STEPS // 2, BATCH, FEATURES, CLASSES):
            optimizer.zero_grad()
            loss = head(net(x), y)
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_([*net.parameters(), *head.parameters()], CLIP).item())
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    assert max(norms) > CLIP  # So that clipping takes part.
    assert module.losses == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(module.head.weight, head.weight)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_a_checkpoint_goes_on_to_the_bit(tmp_path):
    whole = fit(Module(), STEPS)
    half = fit(Module(), STEPS // 2, tmp_path)
    rest = fit(Module(), STEPS, ckpt_path=tmp_path / "saved.ckpt")
    assert half.losses + rest.losses == whole.losses
    assert len(rest.losses) == STEPS - STEPS // 2
    one, other = whole.head.state_dict(), rest.head.state_dict()
    assert {"weight", "momentum", "progress"} <= one.keys() == other.keys()
    # Lightning restores the optimizer's state, so the anchor is the same, too.
    assert all(torch.equal(one[name], other[name]) for name in one)
