#!/usr/bin/env python3
"""Trains with pytorch-metric-learning's trainer and a head for its loss; the README beside this file says how to run it."""

import argparse
import math

import torch
from partialfc.torch import Head
from pytorch_metric_learning import losses, trainers
from torch import nn

FEATURES, DIM, BATCH = 64, 32, 64


def photos(people: int, rows: int, seed: int):
    """Made-up photos: a person's picture and noise."""
    pictures = torch.randn(people, FEATURES, generator=torch.Generator().manual_seed(1))
    numbers = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, people, (rows,), generator=numbers)
    return pictures[labels] + 0.5 * torch.randn(rows, FEATURES, generator=numbers), labels


class HeadLoss(nn.Module):
    """A head as the trainer calls its losses, with what miners and references give, which a head does not have."""

    def __init__(self, head: Head):
        super().__init__()
        self.head = head

    def forward(self, embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None):
        if indices_tuple is not None or ref_emb is not None or ref_labels is not None:
            raise ValueError("a head has all classes to compare with: it takes no miner and no references")
        return self.head(embeddings, labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(";", maxsplit=1)[0])
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--loss", choices=("head", "arcface"), default="head", help="arcface: pytorch-metric-learning's own")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(FEATURES, 128), nn.PReLU())
    embedder = nn.Sequential(nn.Linear(128, DIM), nn.BatchNorm1d(DIM))
    if arguments.loss == "head":
        # The margin is 17 degrees there and radians here.
        loss_func = HeadLoss(Head(arguments.people, DIM, sample_rate=0.5, m2=math.radians(17), scale=32.0, momentum=0.9, weight_decay=5e-4))
    else:
        loss_func = losses.ArcFaceLoss(arguments.people, DIM, margin=17, scale=32.0)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    losses_of_epoch = []

    def remember(trainer):
        losses_of_epoch.append(trainer.losses["total_loss"].item())

    def report(trainer):
        print(f"epoch {trainer.epoch}  mean loss {sum(losses_of_epoch) / len(losses_of_epoch):.3f}")
        losses_of_epoch.clear()

    trainer = trainers.MetricLossOnly(
        models={"trunk": trunk, "embedder": embedder},
        optimizers={
            "trunk_optimizer": torch.optim.SGD(trunk.parameters(), **options),
            "embedder_optimizer": torch.optim.SGD(embedder.parameters(), **options),
            # The loss's own. Its step updates the class centers.
            "metric_loss_optimizer": torch.optim.SGD(loss_func.parameters(), **options),
        },
        batch_size=BATCH,
        loss_funcs={"metric_loss": loss_func},
        dataset=torch.utils.data.TensorDataset(*photos(arguments.people, 40 * BATCH, seed=2)),
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        end_of_iteration_hook=remember,
        end_of_epoch_hook=report,
    )
    trainer.train(num_epochs=arguments.epochs)

    images, labels = photos(arguments.people, 500, seed=3)
    network = nn.Sequential(trunk, embedder).eval()
    with torch.no_grad():
        embeddings = network(images)
        if arguments.loss == "head":
            nearest = loss_func.head.top_k(embeddings, 1)[0][:, 0]
        else:
            nearest = loss_func.get_logits(embeddings).argmax(1)
    right = int((nearest == labels).sum())
    print(f"{right} of 500 new photos recognized")
    assert right > 400


if __name__ == "__main__":
    main()
