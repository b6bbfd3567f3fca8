"""A model of the times of a step on GPUs, from the limits of the products' main loops (sass.py) and the bytes that do not hide behind
them: precision half, SGD with momentum, one rank, P kept, prepared before; and of the draw that prepares it, from its launches and its
instructions. `kernels/gates --steps` prints both, and benches/gpu.md has their formulas. A model knows what is written here and nothing
else: its times are no measurement. They are for comparing one shape of a tile with another, before and after.

Tiles come from tune.h by the host's compiler, the rule of splits from src/device/cuda/sizes/chunks.rs by rustc.
"""

import collections
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import sass

KERNELS = pathlib.Path(__file__).resolve().parent
CUDA = KERNELS.parent / "src/device/cuda"

Device = collections.namedtuple("Device", "name arch multiprocessors clock memory")
# NVIDIA's data sheets: SMs, A100's boost clock, bytes a second of the memory. 1.755 GHz is an estimate of H100's clock under such a load:
# its data sheet's 989 TFLOP/s are those of 1.83 GHz.
DEVICES = (
    Device("H100 SXM", "90a", 132, 1.755e9, 3.35e12),
    Device("H200", "90a", 132, 1.755e9, 4.8e12),
    Device("A100 SXM 80 GB", "80", 108, 1.41e9, 2.039e12),
)
SAMPLE, DIM = 125000, 512
BATCHES = (4096, 1024)
PRODUCTS = ("gemm_numerators_half", "gemm_weighted_centers_half", "gemm_center_gradient_half_512")

# Estimates. The share of its limit that a main loop reaches, which has latencies and a barrier a turn; and that a memory reaches.
LOOP_REACHED = 0.8
MEMORY_REACHED = 0.9
# The kernels of a step beside the products wait for each other: their number, and the seconds from one's start to the next one's.
SMALL_KERNELS, SMALL_TIME = 14, 6e-6

# Draws: (classes, rows) of one rank, a tenth of the classes in a sample.
DRAWS = ((1_250_000, 4096), (10_000_000, 4096))
DRAW_RATE = 0.1
# pack_labels, judge_labels, sort_labels, mark_below, pick_threshold, count_sample, list_sample.
DRAW_KERNELS = 7
KEYS_KERNEL = "mark_below"
# Integer instructions of an SM and clock, by lane (CUDA C++ programming guide, compute capabilities 8.0 and 9.0); the classes of a lane in
# a turn of the loop over keys.
INTEGERS, LANE_CLASSES = 64, 4
# Instructions of the kernels with one CTA, counted in the code for sm_90a: of sort_labels a row and pass of 8 bits, of pick_threshold a
# listed class and histogram of 12 bits. For lists, twelve times the root of the wanted classes.
SORT_INSTRUCTIONS, PICK_INSTRUCTIONS, LISTED = 120, 60, 12

TILES = """
#include "tune.h"
#include <cstdio>
int main() {
    constexpr GemmTile tiles[] = {gemm_tile(Gemm::kNumerators), gemm_tile(Gemm::kWeightedCenters),
                                  gemm_tile(Gemm::kCenterGradient, row_width(DIM), true)};
    for (const GemmTile& tile : tiles) std::printf("%d %d %d %d\\n", tile.m, tile.n, tile.k, tile.ctas_per_sm);
    std::printf("%u\\n", accumulated_columns(1));
}
"""
# The modules that chunks.rs knows by these names.
SPLITS = """#![allow(dead_code)]
mod device { pub mod cuda {
    pub mod context { #[derive(Clone, Copy, Debug)] pub(crate) struct GpuCapacity { pub multiprocessors: u32, pub free_memory: u64 } }
    pub mod shared_structs { CONSTANTS }
    pub mod sizes { #[path = "PATH"] pub mod chunks; }
    pub fn print() { for (b, gpu) in CASES { println!("{}", sizes::chunks::weighted_splits(b, DIM, SAMPLE, gpu)); } }
} }
fn main() { device::cuda::print() }
"""
Tile = collections.namedtuple("Tile", "m n k ctas")


def built(command, name, text, folder):
    """What a program prints, compiled from `text`."""
    source, program = folder / name, folder / "program"
    source.write_text(text)
    for words in ([*command, "-o", program, source], [program]):
        try:
            done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
        except OSError as error:
            sys.exit(f"gates: {words[0]}: {error}")
        if done.returncode != 0:
            sys.exit(f"gates: the model of steps: {(done.stdout + done.stderr).strip()}")
    return done.stdout.split()


def code():
    """The products' tiles, the columns between two additions of weighted centers to memory, and the splits of each batch and device."""
    cases = [(batch, device.multiprocessors) for batch in BATCHES for device in DEVICES]
    constants = "".join(
        re.findall(r"pub\(crate\) const TILE_(?:ROWS|COLUMNS): u64 = \d+;", (CUDA / "shared_structs.rs").read_text())
    )
    text = SPLITS.replace("CONSTANTS", constants).replace("PATH", str(CUDA / "sizes/chunks.rs"))
    text = text.replace("CASES", str(cases)).replace("DIM", str(DIM)).replace("SAMPLE", str(SAMPLE))
    compiler = (os.environ.get("CXX") or "c++").split()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        splits = [int(word) for word in built([os.environ.get("RUSTC") or "rustc"], "splits.rs", text, folder)]
        command = [*compiler, "-std=c++17", f"-I{KERNELS}"]
        *numbers, accumulated = (int(word) for word in built(command, "tiles.cpp", TILES.replace("DIM", str(DIM)), folder))
    tiles = [Tile(*numbers[at : at + 4]) for at in range(0, len(numbers), 4)]
    return tiles, accumulated, dict(zip(cases, splits))


def blocks_up(value, size):
    return -(-value // size)


class Product:
    """A product's main loops, dealt to SMs block by block: first one to each, then the next."""

    def __init__(self, loop, device, tile, blocks, depth):
        rate = LOOP_REACHED * loop.rate(sass.RATES[device.arch]) * device.clock
        waves, rest = divmod(blocks, device.multiprocessors * tile.ctas)
        # Blocks of the SM that has most of them.
        most = waves * tile.ctas + min(tile.ctas, blocks_up(rest, device.multiprocessors))
        self.filled = blocks / (device.multiprocessors * most)
        self.time = most * 2 * tile.m * tile.n * blocks_up(depth, tile.k) * tile.k / rate


def step(loops, device, batch, tiles, accumulated, splits):
    """Seconds of the numerators, the weighted centers, the center gradient and the small kernels, and the three products' loops."""
    loops = [loops[name, device.arch] for name in PRODUCTS]
    memory = MEMORY_REACHED * device.memory
    sms = device.multiprocessors * device.clock
    cache = sass.RATES[device.arch].l2 * sms
    rows, probabilities, centers = batch * DIM, batch * SAMPLE, SAMPLE * DIM

    blocks = [blocks_up(batch, tile.m) * blocks_up(DIM, tile.n) for tile in tiles]
    blocks[0] = blocks_up(batch, tiles[0].m) * blocks_up(SAMPLE, tiles[0].n)
    blocks[1] *= splits
    blocks[2] = blocks_up(SAMPLE, tiles[2].m)
    share = blocks_up(SAMPLE, splits)
    products = [
        Product(loop, device, tile, count, depth) for loop, tile, count, depth in zip(loops, tiles, blocks, (DIM, share, batch))
    ]
    # P goes through shared memory on its way out, written and read. Two CTAs share an SM: the rest hides behind the other one's loop.
    numerators = max(
        products[0].time + 4 * probabilities / (sass.SHARED_BYTES * sms), (2 * probabilities + 2 * centers + 2 * rows) / memory
    )
    # A split's sums are written, and each later part of its columns is added to what is there.
    stored = rows * splits * (8 * blocks_up(share, accumulated) - 4)
    weighted = max(products[1].time + stored / memory, (2 * probabilities + 2 * centers + stored) / memory)
    # W and the momentum: the loop prefetches them to the second-level cache; reading them from there and writing them hides nowhere.
    update = 8 * centers / cache + 8 * centers / memory
    gradient = max(products[2].time + update, (2 * probabilities + 2 * rows + 16 * centers) / memory)
    # pack, normalize, scale, embedding gradient and finish move rows of B; reduce_rows the sums of a tile's columns.
    small = SMALL_KERNELS * SMALL_TIME + (48 * rows + 8 * probabilities / tiles[0].n) / memory
    return (numerators, weighted, gradient, small), products


def draw(key_loop, device, classes, rows):
    """Seconds of the launches, the pass over keys, the kernels of one CTA, and the bytes of bits and lists."""
    clocks = device.clock * INTEGERS
    sample = int(DRAW_RATE * classes)
    passes = blocks_up(classes.bit_length(), 8)
    # The window has the root's digits: the share of it in 32 bits decides the histograms.
    listed = LISTED * (sample - rows) ** 0.5
    histograms = blocks_up(int(listed / classes * 2**32).bit_length(), 12)
    keys = classes / LANE_CLASSES * key_loop / (clocks * device.multiprocessors)
    one = (rows * passes * SORT_INSTRUCTIONS + listed * histograms * PICK_INSTRUCTIONS) / clocks
    # Bits: read and written with the keys, read, read and cleared. The sample's classes and what is positive of them are written.
    moved = (5 / 8 * classes + 8 * sample) / (MEMORY_REACHED * device.memory)
    return DRAW_KERNELS * SMALL_TIME, keys, one, moved


DRAW_ROW = "{:<16} {:>9} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9}"


def report_draws(key_loops):
    """Lines for each device and draw; `key_loops`: {(entry, architecture): instructions}."""
    missing = sorted(device.arch for device in DEVICES if (KEYS_KERNEL, device.arch) not in key_loops)
    if missing:
        sys.exit(f"gates: --steps needs {KEYS_KERNEL} on {', '.join(missing)}")
    lines = ["\na model of `prepare`, labels and draw of a tenth of C classes without their gather, in ms; not measured"]
    lines.append(DRAW_ROW.format("GPU", "C", "B", "launches", "keys", "one CTA", "bytes", "prepare"))
    for device in DEVICES:
        for classes, rows in DRAWS:
            times = draw(key_loops[KEYS_KERNEL, device.arch], device, classes, rows)
            lines.append(DRAW_ROW.format(device.name, classes, rows, *(f"{1e3 * time:.3f}" for time in (*times, sum(times)))))
    return lines


ROW = "{:<16} {:>6} {:>12} {:>12} {:>9} {:>9} {:>12} {:>9} {:>8} {:>8}"


def report(loops):
    """Lines for each device and batch; `loops`: {(entry, architecture): sass.Loop}."""
    missing = [f"{name} on {arch}" for name in PRODUCTS for arch in {device.arch for device in DEVICES} if (name, arch) not in loops]
    if missing:
        sys.exit(f"gates: --steps needs {', '.join(sorted(missing))}")
    tiles, accumulated, splits = code()
    lines = [f"\na model of steps, (S, d) = ({SAMPLE}, {DIM}), in ms; not measured"]
    lines.append(ROW.format("GPU", "B", "numerators", "weighted", "splits", "filled", "gradient", "(filled)", "small", "step"))
    for device in DEVICES:
        for batch in BATCHES:
            split = splits[batch, device.multiprocessors]
            times, products = step(loops, device, batch, tiles, accumulated, split)
            numerators, weighted, gradient, small, whole = (f"{1e3 * time:.2f}" for time in (*times, sum(times)))
            filled = [f"{100 * product.filled:.0f} %" for product in products[1:]]
            lines.append(ROW.format(device.name, batch, numerators, weighted, split, filled[0], gradient, filled[1], small, whole))
    return lines
