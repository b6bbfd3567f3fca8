#!/usr/bin/env python3
"""Trains a linear backbone under a head with NumPy alone; the README beside this file says how to run it."""

import argparse
import pathlib

import numpy as np
import partialfc

PEOPLE, FEATURES, DIM, BATCH, STEPS = 200, 32, 64, 100, 300


def photos(numbers, people, labels):
    """A photo is its person and noise."""
    return people[labels] + 0.3 * numbers.standard_normal((len(labels), FEATURES), dtype=np.float32)


def train(head, backbone, people, numbers, steps):
    """The loss of each step. The head updates its class centers; the backbone is this program's."""
    velocity = np.zeros_like(backbone)
    losses = []
    for step in range(steps):
        labels = numbers.integers(0, PEOPLE, BATCH)
        x = photos(numbers, people, labels)
        loss, gradient = head.step(x @ backbone, labels, learning_rate=0.1)
        velocity = 0.9 * velocity + x.T @ gradient
        backbone -= 0.01 * velocity
        losses.append(loss)
        if step % 50 == 0:
            print(f"step {step:3}  loss {loss:.3f}")
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(";", maxsplit=1)[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/numpy.npz"), help="what is saved and restored")
    arguments = parser.parse_args()

    numbers = np.random.default_rng(0)
    people = numbers.standard_normal((PEOPLE, FEATURES), dtype=np.float32)
    backbone = 0.2 * numbers.standard_normal((FEATURES, DIM), dtype=np.float32)
    options = {"sample_rate": 0.5, "scale": 16.0, "m2": 0.3}
    head = partialfc.Head(PEOPLE, DIM, BATCH, **options)
    print(head.device.info)
    losses = train(head, backbone, people, numbers, STEPS)

    # What there is to save: rows first, then the progress. The steps that follow have the same bits.
    draws, updates = head.read_progress()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(arguments.out, centers=head.read_centers(), momentum=head.read_state(), progress=[draws, updates])
    saved = np.load(arguments.out)
    again = partialfc.Head(PEOPLE, DIM, BATCH, **options)
    again.write_centers(saved["centers"])
    again.write_state(saved["momentum"])
    again.write_progress(*saved["progress"].tolist())
    labels = numbers.integers(0, PEOPLE, BATCH)
    x = photos(numbers, people, labels) @ backbone
    one, other = (each.step(x, labels, 0.1)[0] for each in (head, again))
    assert one == other, (one, other)

    labels = numbers.integers(0, PEOPLE, 500)
    nearest, _ = head.top_k(photos(numbers, people, labels) @ backbone, k=1)
    right = int((nearest[:, 0] == labels).sum())
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; {right} of 500 new photos recognized")
    assert right > 400


if __name__ == "__main__":
    main()
