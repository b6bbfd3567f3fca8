#!/usr/bin/env python3
"""What a step costs in Python beyond the library's own time: B = 64, best of many.

    benches/python_step.py

The same step is called through `partialfc.Head` and, with arguments that are made once, through the C function
alone. The two take turns, so that both see the same machine.
"""

import ctypes
import time

import numpy as np
import partialfc
from partialfc import _abi
from partialfc._library import lib

BATCH, DIM, CLASSES, STEPS = 64, 512, 1000, 2000


def main():
    head = partialfc.Head(CLASSES, DIM, BATCH, sample_rate=0.1, device=partialfc.Device.cpu(1))
    numbers = np.random.default_rng(0)
    embeddings = numbers.standard_normal((BATCH, DIM), dtype=np.float32)
    labels = numbers.integers(0, CLASSES, BATCH)
    gradient = np.empty_like(embeddings)
    matrices = [
        _abi.pfc_matrix(array.ctypes.data, _abi.PFC_F32, 0, BATCH, DIM, DIM) for array in (embeddings, gradient)
    ]
    loss = ctypes.c_double()
    arguments = (
        head._address,
        ctypes.byref(matrices[0]),
        labels.ctypes.data,
        0.0,
        ctypes.byref(matrices[1]),
        ctypes.byref(loss),
    )
    ways = {
        "C": lambda: lib.pfc_head_step(*arguments),
        "NumPy": lambda: head.step(embeddings, labels, 0.0, gradient),
    }
    try:
        import torch

        tensors = torch.from_numpy(embeddings), torch.from_numpy(labels), torch.from_numpy(gradient)
        ways["torch"] = lambda: head.step(tensors[0], tensors[1], 0.0, tensors[2])
    except ImportError:
        pass
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(STEPS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    for name, seconds in best.items():
        more = 1e6 * (seconds - best["C"])
        print(f"{name:6} {1e6 * seconds:8.1f} us{'' if name == 'C' else f', {more:5.1f} us more'}")


if __name__ == "__main__":
    main()
