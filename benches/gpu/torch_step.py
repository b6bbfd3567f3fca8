#!/usr/bin/env python3
"""What PyTorch makes of the same work, for benches/gpu.rs to compare with: times as JSON.

  torch_step.py --out torch.json           the shapes of benches/gpu.md, on GPU 0
  torch_step.py --out torch.json --rates   the GPU's rates alone: a large product, a large copy
  torch_step.py --out torch.json --cpu --tiny     without a GPU, a tiny shape: that the program works; its times tell nothing

Measured, medians of CUDA events in microseconds, on random data:

  gemm_tflops, copy_gbs   torch.mm of 8192 x 8192 x 8192 (the better of fp16 and bf16); a copy of 1 GiB, read and written
  numerators_us           [B, d] @ [S, d].T in fp16      the three products of a step, by cuBLAS, nothing fused;
  weighted_centers_us     [B, S] @ [S, d] in bf16        operands in turn of sets that together are 256 MiB at least
  center_gradient_us      [B, S].T @ [B, d] in bf16
  prepared_us, step_us    a plain PartialFC step without and with the draw of its sample
  peak_mb                 what the step allocates beyond W and momentum, at most

The step is PartialFC as one would write it: the sampled rows are gathered into a contiguous matrix, normalized, multiplied in half
precision by autocast; ArcFace's margin on the target by acos and cos, cross entropy over the sample, autograd, SGD with momentum on
the sampled rows, which are written back. Written for this comparison.
"""

import argparse
import json
import statistics
import sys
import time

SHAPES = [(1024, 125000, 512), (4096, 125000, 512), (4096, 125000, 256), (512, 20000, 512)]
TINY = [(64, 256, 64)]
RATE = 0.1
SCALE, MARGIN = 64.0, 0.5
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4


def parse():
    parser = argparse.ArgumentParser(description="What PyTorch makes of a head's step, as JSON.")
    parser.add_argument("--out", required=True, help="file that the figures go to")
    parser.add_argument("--rates", action="store_true", help="the rates of a large product and a large copy alone")
    parser.add_argument("--steps", type=int, default=20, help="times of each, of which the median counts (default: 20)")
    parser.add_argument("--tiny", action="store_true", help="one tiny shape")
    parser.add_argument("--cpu", action="store_true", help="on the CPU: its times tell nothing about a GPU")
    return parser.parse_args()


class Timer:
    """Microseconds of what a function puts on the device."""

    def __init__(self, torch, cpu, steps):
        self.torch, self.cpu, self.steps = torch, cpu, steps

    def once(self, run):
        if self.cpu:
            start = time.perf_counter()
            run()
            return 1e6 * (time.perf_counter() - start)
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def median(self, run, before=lambda: None):
        """`before` runs before each time and is not timed."""
        times = []
        for step in range(3 + self.steps):
            before()
            if not self.cpu:
                self.torch.cuda.synchronize()
            took = self.once(run)
            if step >= 3:
                times.append(took)
        return statistics.median(times)


class Rotated:
    """Matrices of random values, enough sets of them that none is still in the caches."""

    BEYOND = 256 << 20

    def __init__(self, torch, device, shapes, dtype):
        size = sum(rows * columns for rows, columns in shapes) * 2
        count = min(max(2, -(-self.BEYOND // size)), 64)  # 64: of tiny ones
        random = lambda rows, columns: torch.rand(rows, columns, device=device).sub_(0.5).to(dtype)
        self.sets = [[random(*shape) for shape in shapes] for _ in range(count)]
        self.turn = 0

    def next(self):
        self.turn += 1
        return self.sets[self.turn % len(self.sets)]


def product(torch, timer, device, left, right, dtype, transposed=()):
    """The time of a product; `transposed` tells which operands are stored the other way round."""
    stored = [shape[::-1] if place in transposed else shape for place, shape in enumerate((left, right))]
    operands = Rotated(torch, device, stored, dtype)
    out = torch.empty(left[0], right[1], device=device, dtype=dtype)

    def run():
        one, other = (matrix.t() if place in transposed else matrix for place, matrix in enumerate(operands.next()))
        torch.mm(one, other, out=out)

    return timer.median(run)


class Head:
    """A plain PartialFC head on one rank. `dtype` is what autocast multiplies in; None: float32."""

    def __init__(self, torch, device, classes, sample, dim, dtype):
        self.torch, self.device, self.dtype, self.classes, self.sample = torch, device, dtype, classes, sample
        self.weight = torch.empty(classes, dim, device=device).normal_(std=0.01)
        self.momentum = torch.zeros_like(self.weight)

    def draw(self, labels):
        """Sampled classes, ascending, positives among them, or a slice of all; each label's place there."""
        torch = self.torch
        if self.sample == self.classes:
            return slice(None), labels
        keys = torch.rand(self.classes, device=self.device)
        keys[labels] = 2.0
        index = torch.topk(keys, self.sample).indices.sort().values
        return index, torch.searchsorted(index, labels)

    def step(self, embeddings, index, places):
        torch = self.torch
        functional = torch.nn.functional
        embeddings = embeddings.detach().requires_grad_(True)
        rows = self.weight[index].detach().requires_grad_(True)
        with torch.autocast(torch.device(self.device).type, dtype=self.dtype, enabled=self.dtype is not None):
            cosines = functional.linear(functional.normalize(embeddings), functional.normalize(rows))
        cosines = cosines.float().clamp(-1 + 1e-6, 1 - 1e-6)
        target = cosines.gather(1, places[:, None])
        with_margin = torch.cos(torch.acos(target) + MARGIN)
        loss = functional.cross_entropy(cosines.scatter(1, places[:, None], with_margin) * SCALE, places)
        loss.backward()
        with torch.no_grad():
            if isinstance(index, slice):
                self.momentum.mul_(MOMENTUM).add_(rows.grad).add_(rows, alpha=WEIGHT_DECAY)
                self.weight.sub_(self.momentum, alpha=LEARNING_RATE)
                return loss.detach(), embeddings.grad
            momentum = self.momentum[index].mul_(MOMENTUM).add_(rows.grad).add_(rows, alpha=WEIGHT_DECAY)
            self.weight[index] = rows - LEARNING_RATE * momentum
            self.momentum[index] = momentum
        return loss.detach(), embeddings.grad


def rates(torch, timer, device, tiny):
    side = 256 if tiny else 8192
    square = (side, side)
    times = [product(torch, timer, device, square, square, dtype) for dtype in (torch.float16, torch.bfloat16)]
    count = (1 << 20 if tiny else 1 << 30) // 4
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    copy = timer.median(lambda: target.copy_(source))
    return {"gemm_tflops": 2e-6 * side**3 / min(times), "copy_gbs": 8e-3 * count / copy}


def shape_figures(torch, timer, device, batch, sample, dim):
    figures = {"batch": batch, "sample": sample, "dim": dim}
    half, wide = torch.float16, torch.bfloat16
    figures["numerators_us"] = product(torch, timer, device, (batch, dim), (dim, sample), half, transposed=(1,))
    figures["weighted_centers_us"] = product(torch, timer, device, (batch, sample), (sample, dim), wide)
    figures["center_gradient_us"] = product(torch, timer, device, (sample, batch), (batch, dim), wide, transposed=(0,))

    head = Head(torch, device, round(sample / RATE), sample, dim, wide if device == "cpu" else half)
    embeddings = [torch.randn(batch, dim, device=device) for _ in range(4)]
    labels = [torch.randint(head.classes, (batch,), device=device) for _ in range(4)]
    state = {"turn": 0, "drawn": None, "loss": None}

    def draw():
        state["turn"] = (state["turn"] + 1) % 4
        state["drawn"] = head.draw(labels[state["turn"]])

    def step():
        state["loss"], _ = head.step(embeddings[state["turn"]], *state["drawn"])

    def both():
        draw()
        step()

    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    figures["prepared_us"] = timer.median(step, before=draw)
    figures["step_us"] = timer.median(both)
    if on_gpu:
        figures["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    figures["loss"] = float(state["loss"])
    if not 0 < figures["loss"] < float("inf"):
        sys.exit(f"torch_step: the loss is {figures['loss']}")
    return figures


def main():
    options = parse()
    try:
        import torch
    except ImportError as error:
        sys.exit(f"torch_step: {error}")
    if not options.cpu and not torch.cuda.is_available():
        sys.exit("torch_step: PyTorch sees no GPU; --cpu runs without")
    device = "cpu" if options.cpu else "cuda:0"
    torch.manual_seed(1)
    timer = Timer(torch, options.cpu, options.steps)
    figures = {
        "device": "cpu" if options.cpu else torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        **rates(torch, timer, device, options.tiny),
        "shapes": [],
    }
    print(f"{figures['device']}, PyTorch {figures['torch']}")
    print(f"large product {figures['gemm_tflops']:.1f} TFLOP/s, copy {figures['copy_gbs']:.0f} GB/s", flush=True)
    for shape in [] if options.rates else TINY if options.tiny else SHAPES:
        of_shape = shape_figures(torch, timer, device, *shape)
        figures["shapes"].append(of_shape)
        words = (f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in of_shape.items())
        print("  ".join(words), flush=True)
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump(figures, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
