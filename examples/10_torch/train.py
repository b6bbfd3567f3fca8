#!/usr/bin/env python3
"""Trains a small convolutional network under a head with PyTorch; the README beside this file says how to run it."""

import argparse
import os
import pathlib

import numpy as np
import torch
import torch.distributed as dist
from partialfc.torch import Head
from report import Report
from torch import nn

SIDE = 32


class Glyphs:
    """Images of `glyphs --export`, or ones that are made up: for each class a picture, moved and spotted."""

    def __init__(self, path: pathlib.Path | None, classes: int):
        if path is None:
            numbers = torch.Generator().manual_seed(1)
            pictures = (torch.rand(classes, 8, 8, generator=numbers) > 0.5).float()
            self.pictures = nn.functional.interpolate(pictures[:, None], SIDE)[:, 0]
            self.classes, self.labels = classes, None
            self.held_out = self.made_up(numbers, 500)
            return
        raw = path.read_bytes()
        if raw[:8] != b"pfcimage":
            raise SystemExit(f"{path} is no file of glyphs --export")
        self.classes, pixels, training, held_out = np.frombuffer(raw, "<u8", 4, 8).tolist()
        labels = torch.from_numpy(np.frombuffer(raw, "<i8", training + held_out, 40).copy())
        images = torch.from_numpy(np.frombuffer(raw, "u1", -1, 40 + 8 * len(labels)).copy()).view(-1, SIDE, SIDE)
        assert pixels == SIDE * SIDE
        self.images, self.labels = images[:training].float() / 255, labels[:training]
        self.held_out = images[training:].float() / 255, labels[training:]

    def made_up(self, numbers, rows):
        labels = torch.randint(0, self.classes, (rows,), generator=numbers)
        return self.pictures[labels] + 0.5 * torch.randn(rows, SIDE, SIDE, generator=numbers), labels

    def batch(self, numbers, rows):
        """Images moved by up to two pixels, and their labels."""
        if self.labels is None:
            images, labels = self.made_up(numbers, rows)
        else:
            chosen = torch.randint(0, len(self.labels), (rows,), generator=numbers)
            images, labels = self.images[chosen], self.labels[chosen]
        moves = torch.randint(-2, 3, (2,), generator=numbers).tolist()
        return torch.roll(images, moves, (1, 2))[:, None], labels


def network(dim: int) -> nn.Module:
    def block(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(*block(1, 16), *block(16, 32), *block(32, 64), nn.Flatten(), nn.Linear(64 * 16, dim), nn.BatchNorm1d(dim))


class Model(nn.Module):
    """The backbone and the head, which DDP may wrap together: class centers are no parameters."""

    def __init__(self, classes: int, dim: int, rate: float):
        super().__init__()
        self.backbone = network(dim)
        self.head = Head(classes, dim, sample_rate=rate, scale=32.0, m2=0.3, metrics_every=1)

    def forward(self, images, labels):
        return self.head(self.backbone(images), labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(";", maxsplit=1)[0])
    parser.add_argument("--data", type=pathlib.Path, help="images of glyphs --export; without it they are made up")
    parser.add_argument("--classes", type=int, default=200, help="of images that are made up (%(default)s)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128, help="rows of all ranks (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.5, help="sample_rate (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=20, help="steps from one report to the next (%(default)s)")
    parser.add_argument("--metrics", type=pathlib.Path, help="file for a line of JSON with each report")
    parser.add_argument("--plot", type=pathlib.Path, help="file for a picture of the loss, the top-1 and the learning rate")
    arguments = parser.parse_args()

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    data = Glyphs(arguments.data, arguments.classes)
    model = Model(data.classes, 128, arguments.rate)
    wrapped = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=arguments.lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=arguments.steps)

    numbers = torch.Generator().manual_seed(rank)
    report = Report(arguments.steps, arguments.every, arguments.metrics, arguments.plot) if rank == 0 else None
    for _ in range(arguments.steps):
        images, labels = data.batch(numbers, arguments.batch // ranks)
        optimizer.zero_grad()
        loss = wrapped(images, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 5)
        optimizer.step()
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        if report is not None:
            # Rank 0 alone may ask for it.
            metrics = model.head.last_metrics
            report.step(
                arguments.batch,
                loss=metrics.loss,
                top1=metrics.top1,
                target_cosine=metrics.mean_target_cosine,
                learning_rate=learning_rate,
            )
    if report is not None:
        report.close()

    # The nearest class center of images that the network has not seen, over the class centers of all ranks.
    model.eval()
    images, labels = data.held_out
    with torch.no_grad():
        nearest, _ = model.head.top_k(model.backbone(images[:, None]), 1)
    if rank == 0:
        right = (nearest[:, 0] == labels).float().mean().item()
        print(f"{data.classes} classes, {len(labels)} held-out images, {100 * right:.1f} % recognized")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
