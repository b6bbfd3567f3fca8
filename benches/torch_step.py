#!/usr/bin/env python3
"""What a step of a plain PartialFC head in PyTorch takes on the CPU, for benches/step.rs to compare with.

  torch_step.py B C RATE D       rows, classes, sample rate, embedding_dim
    --threads N                  PyTorch's threads     (default: its own)
    --half                       products in bfloat16 by autocast
    --steps N                    steps timed           (default: 7; the median counts)

Prints the seconds of a step, draw of the sample, forward, backward and SGD on the sampled rows, and the peak memory of the process in MB.
The head is that of gpu/torch_step.py.
"""

import argparse
import importlib.util
import pathlib
import resource
import statistics
import sys
import time

HEAD = pathlib.Path(__file__).resolve().parent / "gpu" / "torch_step.py"


def parse():
    parser = argparse.ArgumentParser(description="What a step of a plain PartialFC head in PyTorch takes on the CPU.")
    parser.add_argument("batch", type=int)
    parser.add_argument("classes", type=int)
    parser.add_argument("rate", type=float)
    parser.add_argument("dim", type=int)
    parser.add_argument("--threads", type=int, default=0, help="PyTorch's threads (default: its own)")
    parser.add_argument("--half", action="store_true", help="products in bfloat16 by autocast")
    parser.add_argument("--steps", type=int, default=7, help="steps timed, of which the median counts (default: 7)")
    return parser.parse_args()


def main():
    options = parse()
    try:
        import torch
    except ImportError as error:
        sys.exit(f"torch_step: {error}")
    # Both files have one name.
    plain = importlib.util.spec_from_file_location("plain", HEAD)
    module = importlib.util.module_from_spec(plain)
    plain.loader.exec_module(module)

    torch.manual_seed(1)
    if options.threads:
        torch.set_num_threads(options.threads)
    sample = max(1, int(options.rate * options.classes))
    head = module.Head(torch, "cpu", options.classes, sample, options.dim, torch.bfloat16 if options.half else None)
    times = []
    for step in range(options.steps + 1):
        embeddings = torch.randn(options.batch, options.dim)
        labels = torch.randint(options.classes, (options.batch,))
        start = time.perf_counter()
        loss, _ = head.step(embeddings, *head.draw(labels))
        # The first step touches every page for the first time.
        if step > 0:
            times.append(time.perf_counter() - start)
    if not 0 < float(loss) < float("inf"):
        sys.exit(f"torch_step: the loss is {float(loss)}")
    print(statistics.median(times), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3)


if __name__ == "__main__":
    main()
