#!/usr/bin/env python3
"""A loop in the manner of insightface's arcface_torch/train_v2.py; the README beside this file says how to run it."""

import argparse
import os

import torch
import torch.distributed as dist
from losses import CombinedMarginLoss
from partialfc.torch import PartialFC_V2  # from partial_fc_v2 import PartialFC_V2
from torch import nn


def images(numbers, people, rows):
    """Made-up photos: a person's picture and noise."""
    labels = torch.randint(0, len(people), (rows,), generator=numbers)
    return people[labels] + 0.5 * torch.randn(rows, people.shape[1], generator=numbers), labels


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(";", maxsplit=1)[0])
    parser.add_argument("--classes", type=int, default=500)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64, help="rows of a rank (%(default)s)")
    parser.add_argument("--sample-rate", type=float, default=0.3)
    arguments = parser.parse_args()

    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "12584")
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    people = torch.randn(arguments.classes, 128, generator=torch.Generator().manual_seed(1))
    numbers = torch.Generator().manual_seed(rank)

    backbone = nn.Sequential(nn.Linear(128, 256), nn.PReLU(), nn.Linear(256, 64), nn.BatchNorm1d(64))
    backbone = nn.parallel.DistributedDataParallel(backbone)
    backbone.train()

    margin_loss = CombinedMarginLoss(64, 1.0, 0.3, 0.0, interclass_filtering_threshold=0)
    module_partial_fc = PartialFC_V2(margin_loss, 64, arguments.classes, arguments.sample_rate, False)
    module_partial_fc.train()
    opt = torch.optim.SGD(
        params=[{"params": backbone.parameters()}, {"params": module_partial_fc.parameters()}],
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
    )
    lr_scheduler = torch.optim.lr_scheduler.PolynomialLR(opt, total_iters=arguments.steps, power=2)
    amp = torch.amp.GradScaler("cpu", init_scale=1024, growth_interval=100)

    first = None
    for global_step in range(1, arguments.steps + 1):
        img, local_labels = images(numbers, people, arguments.batch)
        local_embeddings = backbone(img)
        loss: torch.Tensor = module_partial_fc(local_embeddings, local_labels)
        amp.scale(loss).backward()
        amp.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
        amp.step(opt)
        amp.update()
        opt.zero_grad()
        lr_scheduler.step()
        first = loss.item() if first is None else first
        if rank == 0 and global_step % 20 == 0:
            print(
                f"Loss {loss.item():.4f}   LearningRate {lr_scheduler.get_last_lr()[0]:.6f}   Global Step: {global_step}"
                f"   Grad Scale: {amp.get_scale():.0f}",
                flush=True,
            )
    checkpoint = {
        "global_step": arguments.steps,
        "state_dict_backbone": backbone.module.state_dict(),
        "state_dict_softmax_fc": module_partial_fc.state_dict(),
        "state_optimizer": opt.state_dict(),
        "state_lr_scheduler": lr_scheduler.state_dict(),
    }
    os.makedirs("out", exist_ok=True)
    torch.save(checkpoint, f"out/checkpoint_gpu_{rank}.pt")
    shape = tuple(checkpoint["state_dict_softmax_fc"]["weight"].shape)
    print(f"rank {rank} of {world_size}: class centers {shape}, loss {first:.3f} at first, {loss.item():.3f} at last")
    assert loss.item() < first
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
