#!/usr/bin/env python3
"""Python, by the package `partialfc`. Calls of the library let other threads run, so a rank is a thread."""

import ctypes
import threading

import numpy as np
import partialfc
from partialfc import _abi  # The size of a struct, which this program alone asks for.

RANKS, BATCH, DIM = 2, 16, 64  # BATCH: rows of a rank


def train(comm, told):
    tells = comm.rank == 0
    labels = np.arange(BATCH) % 8 * 100
    rows, columns = np.arange(BATCH)[:, None], np.arange(DIM)
    x = (rows % 8 * (columns + 3) % 23 / 11 - 1).astype(np.float32)
    v = np.ones(DIM, np.float32)
    head = partialfc.Head(1000, DIM, BATCH, device=partialfc.Device.cpu(1), comm=comm, scale=16, m2=0.3, init_std=0.5)
    if tells:
        print(f"options: {ctypes.sizeof(_abi.pfc_head_options)} bytes, ignore_label {head.options['ignore_label']}")
    for step in range(20):
        embeddings = v * x
        loss, gradient = head.step(embeddings, labels, learning_rate=0.1)
        if tells and step % 4 == 0:
            print(f"step {step} loss {loss:.3f}")
        dv = (gradient * x).sum(axis=0)
        comm.all_reduce(dv)
        v -= np.float32(0.01) * dv
    metrics = head.metrics()
    nearest, cosines = head.top_k(embeddings, 1)
    if tells:
        print(f"updates {metrics.updates}, target cosine {metrics.mean_target_cosine:.3f}")
        print(f"row 9 is class {nearest[9, 0]}, cosine {cosines[9, 0]:.3f}")
        labels[3] = -5
    try:
        head.step(embeddings, labels, learning_rate=0.1)
    except partialfc.PartialFCError as error:
        told[comm.rank] = error
        if tells:
            print(f"{error.status_name}: {error.message}")


def main():
    told = {}
    threads = [threading.Thread(target=train, args=(comm, told)) for comm in partialfc.Comm.threads(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The exception has the text with it, on any thread.
    print(f"the head's: {told[0].message}")


if __name__ == "__main__":
    main()
