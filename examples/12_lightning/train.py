#!/usr/bin/env python3
"""Trains a network under a head with Lightning's Trainer; the README beside this file says how to run it."""

import argparse
import logging
import pathlib
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from partialfc.torch import Head
from torch import nn

FEATURES, DIM = 64, 32


class Photos(torch.utils.data.Dataset):
    """Made-up photos: a person's picture and noise."""

    def __init__(self, people: int, photos: int, seed: int):
        pictures = torch.randn(people, FEATURES, generator=torch.Generator().manual_seed(1))
        numbers = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, people, (photos,), generator=numbers)
        self.images = pictures[self.labels] + 0.5 * torch.randn(photos, FEATURES, generator=numbers)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


class Recognition(lightning.LightningModule):
    """The head is a submodule like any other. Lightning's automatic optimization does the rest."""

    def __init__(self, people: int, steps: int):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Linear(FEATURES, 128), nn.PReLU(), nn.Linear(128, DIM), nn.BatchNorm1d(DIM))
        self.head = Head(people, DIM, sample_rate=0.5, scale=32.0, m2=0.3, metrics_every=1)
        self.losses: list[float] = []

    def training_step(self, batch, _index):
        images, labels = batch
        loss = self.head(self.backbone(images), labels)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, _outputs, _batch, _index):
        # What the update has measured, for the logger that the Trainer has. Rank 0 alone may read it.
        metrics = self.head.last_metrics
        if self.trainer.is_global_zero and self.trainer.global_step % 20 == 0:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            print(f"step {self.trainer.global_step:3}  loss {metrics.loss:.3f}  top-1 {metrics.top1:.2f}  next learning rate {rate:.4f}")

    def configure_optimizers(self):
        # The backbone's parameters and the head's anchor; the settings are those of the head.
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=self.hparams.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trainer(steps: int, *callbacks) -> lightning.Trainer:
    return lightning.Trainer(
        max_steps=steps,
        gradient_clip_val=5.0,
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(";", maxsplit=1)[0])
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/lightning"), help="folder of the checkpoint (%(default)s)")
    arguments = parser.parse_args()
    # What Lightning says of GPUs, loggers and workers of a loader.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")

    # In the same order on every run: a checkpoint does not hold the place in a shuffled loader's epoch.
    loader = torch.utils.data.DataLoader(Photos(arguments.people, 64 * 20, seed=2), batch_size=64)
    lightning.seed_everything(0, verbose=False)
    model = Recognition(arguments.people, arguments.steps)
    saving = ModelCheckpoint(arguments.out, filename="half", every_n_train_steps=arguments.steps // 2, enable_version_counter=False)
    trainer(arguments.steps // 2, saving).fit(model, loader)

    # Another process would begin here. The class centers, their momentum and the place in their samples are in the checkpoint.
    again = Recognition(arguments.people, arguments.steps)
    trainer(arguments.steps).fit(again, loader, ckpt_path=arguments.out / "half.ckpt")

    photos, labels = (torch.stack(column) for column in zip(*Photos(arguments.people, 500, seed=3)))
    again.eval()
    with torch.no_grad():
        nearest, _ = again.head.top_k(again.backbone(photos), 1)
    right = int((nearest[:, 0] == labels).sum())
    print(f"loss {model.losses[0]:.3f} at first, {again.losses[-1]:.3f} at last; {right} of 500 new photos recognized")
    assert right > 400


if __name__ == "__main__":
    main()
