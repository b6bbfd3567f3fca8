#!/usr/bin/env python3
"""What saving and loading a head costs, beside plain transfers of as many bytes by the same disk.

    benches/checkpoint.py [--classes 1000000] [--dim 512] [--dtype f32] [--residency device] [--repeats 3] [--folder .]
    benches/checkpoint.py --beside [--batch 128] [--rate 0.02] ...

Needs room for twice the rows and their momentum, 8 bytes a number in f32; with `--residency file` three times. Three
rates a line, in MB/s, and what saves and loads are of the first two: `buffered` writes pieces of 4 MiB and flushes, or
reads them; `direct` does so past the page cache, one at a time. Last what the head's call read from the disk and wrote
to it, as Linux counts it. Before each read the files leave the cache, if the system lets us. A save and a load that are
not measured come first, so that no row is a start value any more.

With `--beside` what a save beside training costs: how long the copy takes, and the median step alone, while another
thread writes as many bytes past the page cache (`plain`), and while the save does (`beside`), in turns; then what a step
beside the save takes of the two others. Negatives are drawn in runs of 16.
"""

import argparse
import errno
import math
import mmap
import os
import pathlib
import shutil
import statistics
import tempfile
import threading
import time

import numpy as np
import partialfc

PIECE = 4 << 20


def transfer(path: pathlib.Path, count: int, flags: int, write: bool) -> float:
    """MB/s of a file of `count` bytes."""
    piece = mmap.mmap(-1, PIECE)
    piece.write(os.urandom(PIECE))
    file = os.open(path, flags | (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY))
    try:
        start = time.perf_counter()
        if write and flags & os.O_DIRECT:
            os.posix_fallocate(file, 0, count)
        for at in range(0, count, PIECE):
            moved = os.pwrite(file, piece, at) if write else os.preadv(file, [piece], at)
            assert moved == PIECE, (moved, at)
        if write:
            os.fsync(file)
        return count / (time.perf_counter() - start) / 1e6
    finally:
        os.close(file)


def direct_transfer(path: pathlib.Path, count: int, write: bool) -> float:
    """As `transfer`, past the page cache; nan where the file system cannot do that."""
    try:
        return transfer(path, count, os.O_DIRECT, write)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return math.nan
        raise


def forget(folder: pathlib.Path) -> None:
    """Takes what is in a folder out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def disk() -> tuple[int, int]:
    """Bytes that this process has read from disks, and written."""
    counts = dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="of class centers and momentum")
    parser.add_argument("--residency", choices=("device", "file"), default="device", help="where the head has its rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, default=".", help="on the disk to measure")
    parser.add_argument("--beside", action="store_true", help="measure saves beside training")
    parser.add_argument("--batch", type=int, default=128, help="with --beside: rows of a step")
    parser.add_argument("--rate", type=float, default=0.02, help="with --beside: sample_rate")
    arguments = parser.parse_args()
    # On the disk, which a folder for temporary files may not be.
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        (measure_beside if arguments.beside else measure)(arguments, pathlib.Path(name))


def measure_beside(arguments: argparse.Namespace, folder: pathlib.Path):
    numbers = np.random.default_rng(0)
    dtypes = {"weight_dtype": arguments.dtype, "state_dtype": arguments.dtype}
    where = {"residency": arguments.residency, "storage_path": folder / "storage" if arguments.residency == "file" else None}
    sampling = {"sample_rate": arguments.rate, "sample_block": 16}
    with partialfc.Head(arguments.classes, arguments.dim, arguments.batch, **sampling, **dtypes, **where) as head:
        grad = np.empty((arguments.batch, arguments.dim), np.float32)

        def step() -> float:
            x = numbers.standard_normal(grad.shape, np.float32)
            labels = numbers.integers(0, arguments.classes, arguments.batch)
            start = time.perf_counter()
            head.step(x, labels, 0.1, grad)
            return time.perf_counter() - start

        # No row is a start value any more.
        head.save(folder / "head")
        head.load(folder / "head")
        print(f"{arguments.classes} classes x {arguments.dim} in {arguments.dtype}, batch {arguments.batch}, rate {arguments.rate}")
        rows = 2 * (2 if arguments.dtype == "bf16" else 4) * arguments.classes * arguments.dim
        print("   save s   copy s   written s   step alone    plain   beside   of alone   of plain")
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            head.save(folder / "head")
            save = time.perf_counter() - start
            alone, plain = [step() for _ in range(20)], []
            writer = threading.Thread(target=direct_transfer, args=(folder / "plain", -(-rows // PIECE) * PIECE, True))
            writer.start()
            while writer.is_alive():
                plain.append(step())
            (folder / "plain").unlink()
            start = time.perf_counter()
            head.save_start(folder / "head")
            copied, beside = time.perf_counter() - start, []
            while not head.save_poll():
                beside.append(step())
            written = time.perf_counter() - start
            steps = [statistics.median(times) for times in (alone, plain, beside)]
            figures = f"{save:9.2f}{copied:9.2f}{written:12.2f}{steps[0]:13.4f}{steps[1]:9.4f}{steps[2]:9.4f}"
            print(f"{figures}{steps[2] / steps[0]:11.2f}{steps[2] / steps[1]:11.2f}", flush=True)


def measure(arguments: argparse.Namespace, folder: pathlib.Path):
    dtype, storage = arguments.dtype, folder / "storage" if arguments.residency == "file" else None
    where = {"residency": arguments.residency, "storage_path": storage}
    with partialfc.Head(arguments.classes, arguments.dim, 1, weight_dtype=dtype, state_dtype=dtype, **where) as head:
        rows = 2 * (2 if dtype == "bf16" else 4) * arguments.classes * arguments.dim
        plain = -(-rows // PIECE) * PIECE
        size = f"{arguments.classes} classes x {arguments.dim}, weight and momentum in {dtype}: {rows / 1e9:.2f} GB"
        print(f"{size}, residency {arguments.residency}")
        print("           buffered   direct     head   of buffered   of direct   read GB   wrote GB")
        head.save(folder / "head")
        head.load(folder / "head")
        shutil.rmtree(folder / "head")
        for _ in range(arguments.repeats):
            for verb, call in (("save", head.save), ("load", head.load)):
                plain_file, write = folder / "plain", verb == "save"
                forget(folder)
                direct = direct_transfer(plain_file, plain, write)
                if write:
                    plain_file.unlink()
                forget(folder)
                buffered = transfer(plain_file, plain, 0, write)
                forget(folder)
                before, start = disk(), time.perf_counter()
                call(folder / "head")
                rate = rows / (time.perf_counter() - start) / 1e6
                read, wrote = ((now - then) / 1e9 for now, then in zip(disk(), before))
                figures = f"{buffered:9.0f}{direct:9.0f}{rate:9.0f}{rate / buffered:14.2f}{rate / direct:12.2f}"
                print(f"{verb:8}{figures}{read:10.2f}{wrote:11.2f}", flush=True)
            shutil.rmtree(folder / "head")
            plain_file.unlink()


if __name__ == "__main__":
    main()
