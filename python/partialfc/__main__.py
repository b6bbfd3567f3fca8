"""What a head takes, class centers of other trainers, what this build is, and the flags that compile programs against it.

    python -m partialfc plan --classes 10_000_000 --ranks 8 --batch 128 --rate 0.1
    python -m partialfc convert rank0.safetensors rank1.safetensors checkpoint
    python -m partialfc convert checkpoint centers.npy
    python -m partialfc info
    cc program.c $(python -m partialfc --cflags --libs) -o program
    cmake -S . -B build -DCMAKE_PREFIX_PATH="$(python -m partialfc --cmake)"
"""

import argparse
import functools
import re
import sys

from . import PartialFCError, Plan, __version__, build_info, plan
from ._library import PREFIX, SONAME, lib
from .convert import convert

#: Rows of the table of `plan`: a field of Plan, and what it is.
_MEMORY = (
    ("weight_bytes", "class centers"),
    ("state_bytes", "optimizer state"),
    ("activation_bytes", "embeddings, gradients"),
    ("probability_bytes", "softmax numerators"),
    ("total_bytes", "memory of a rank"),
)
_HOST = (("host_bytes", "of that in host memory"),)
_STORAGE = (("storage_bytes", "file of a rank"),)
_TRAFFIC = (
    ("labels_bytes", "labels, all-gather"),
    ("embeddings_bytes", "embeddings, all-gather"),
    ("sums_bytes", "sums, all-reduce"),
    ("grad_embeddings_bytes", "gradient, reduce-scatter"),
    ("grad_centers_bytes", "center gradient, all-reduce"),
    ("traffic_bytes", "traffic of a rank and step"),
)


def size(count: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def room(text: str) -> int:
    """Bytes of a text such as 24GiB, 500GB or 1.5TB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT])(i?)B", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 24GiB or 500GB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1))


def most_classes(planned, ranks: int, gpu: int | None, memory: int | None, disk: int | None) -> int:
    """The most classes that the library takes and of which a rank needs no more than that; `planned` plans for as many.

    0: there is no room for a class on each rank.
    """

    def fits(classes: int) -> bool:
        try:
            needed = planned(classes)
        except PartialFCError:  # Beyond what a head may have, or what workspace_limit leaves room for.
            return False
        places = ((needed.total_bytes - needed.host_bytes, gpu), (needed.host_bytes, memory), (needed.storage_bytes, disk))
        return all(there is None or wanted <= there for wanted, there in places)

    few, many = 0, ranks
    while fits(many):
        few, many = many, 2 * many
    while few > 0 and many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle) else (few, middle)
    return few


def table(arguments) -> str:
    """Memory and traffic of the placements, side by side."""
    columns = [("sharded, all classes", "sharded", 1.0), ("replicated, all classes", "replicated", 1.0)]
    if arguments.rate < 1:
        columns.insert(1, (f"sharded, rate {arguments.rate:g}", "sharded", arguments.rate))
        columns.append((f"replicated, rate {arguments.rate:g}", "replicated", arguments.rate))
    on_file, on_host = arguments.residency == "file", arguments.gpu is not None and arguments.residency == "host"
    # Nothing is written there: a plan makes no file.
    storage = {"storage_path": ".", "storage_cache": arguments.cache or 0} if on_file else {}
    for option in ("disk", "cache"):
        if getattr(arguments, option) is not None and not on_file:
            raise ValueError(f"--{option} is for rows on disk: give --residency file as well")
    if arguments.gpu is not None and arguments.memory is not None and not on_host:
        raise ValueError("--memory is for a head on a CPU, or for --gpu with --residency host")

    def planned(placement: str, rate: float, classes: int) -> Plan:
        return plan(
            classes,
            arguments.dim,
            ranks=arguments.ranks,
            batch=arguments.batch,
            gpu_memory=arguments.gpu,
            placement=placement,
            sample_rate=rate,
            optimizer=arguments.optimizer,
            row_update=arguments.row_update,
            precision=arguments.precision,
            workspace_limit=arguments.workspace_limit,
            weight_dtype=arguments.dtype,
            state_dtype=arguments.dtype,
            residency=arguments.residency,
            **storage,
        )

    plans = [planned(placement, rate, arguments.classes) for _, placement, rate in columns]
    rows = [[""] + [title for title, _, _ in columns]]
    rows.append(["classes on a rank"] + [f"{p.shard_rows:,}" for p in plans])
    rows.append(["classes in a step"] + [f"{p.sample_capacity:,}" for p in plans])
    for field, what in _MEMORY + (_HOST if on_host else ()) + (_STORAGE if on_file else ()) + _TRAFFIC:
        rows.append([what] + [size(getattr(p, field)) for p in plans])
    # Bytes of a row of class centers, and with its state.
    center = arguments.dim * (2 if arguments.dtype == "bf16" else 4)
    row = center * (3 if arguments.optimizer == "adamw" else 2)
    if on_host:
        # The product has class centers once, the update all of a row. A dense row that is behind has its state with both, and class
        # centers are read again where numerators are computed twice.
        rows.append(["read over the link, at least"] + [size((center + row) * p.sample_capacity) for p in plans])
        rows.append(["written over it, at least"] + [size(row * p.sample_capacity) for p in plans])
    if on_file:
        # Rows of the cache do not move.
        moving = [1 - min(storage["storage_cache"] // row / p.shard_rows, 1) for p in plans]
        rows.append(["read in a step, and written"] + [size(round(row * p.sample_capacity * part)) for p, part in zip(plans, moving)])
    there = (arguments.gpu, arguments.memory, arguments.disk)
    if there != (None, None, None):
        fitting = (functools.partial(planned, placement, rate) for _, placement, rate in columns)
        rows.append(["most classes that fit"] + [f"{most_classes(fit, arguments.ranks, *there):,}" for fit in fitting])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def converted_to(arguments) -> str:
    """Converts, with a line of progress on a terminal; returns what there is now."""
    names = ("tensor", "dtype", "optimizer", "storage", "raw")
    count = 0

    def progress(done: int, total: int) -> None:
        nonlocal count
        count = total
        if sys.stderr.isatty():
            print(f"\r{done:,} of {total:,} classes", end="\n" if done == total else "", file=sys.stderr, flush=True)

    convert(arguments.sources, arguments.target, progress=progress, **{name: getattr(arguments, name) for name in names})
    return f"{arguments.target}: {count:,} class centers"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m partialfc", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--version", action="version", version=__version__)
    flags = parser.add_argument_group("flags for compilers, which may be given together")
    flags.add_argument("--prefix", action="store_true", help="the folder that has include/ and lib/")
    flags.add_argument("--cflags", action="store_true", help="where the header is")
    flags.add_argument("--libs", action="store_true", help="where the library is, also when the program runs")
    flags.add_argument("--cmake", action="store_true", help="what CMAKE_PREFIX_PATH needs")
    commands = parser.add_subparsers(dest="command", title="commands")
    commands.add_parser("info", help="version, commit, target and backends of the library, and where it lies")
    planned = commands.add_parser(
        "plan",
        help="memory and traffic of a head, for each placement",
        description="Of a head on a CPU, or with --gpu on a GPU, which need not be there. Traffic is what one rank passes to collectives.",
    )
    planned.add_argument("--classes", type=int, required=True, help="num_classes, over all ranks")
    planned.add_argument("--dim", type=int, default=512, help="embedding_dim (%(default)s)")
    planned.add_argument("--ranks", type=int, default=1, help="number of ranks (%(default)s)")
    planned.add_argument("--batch", type=int, default=128, help="rows on each rank (%(default)s)")
    planned.add_argument("--rate", type=float, default=1.0, help="sample_rate (%(default)s)")
    planned.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    planned.add_argument("--row-update", choices=("lazy", "dense"), default="lazy")
    planned.add_argument("--precision", choices=("auto", "f32", "half"), default="auto", help="auto: f32 on a CPU, half on a GPU")
    planned.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="of class centers and optimizer state")
    planned.add_argument(
        "--residency", choices=("device", "host", "file"), default="device", help="host: a GPU's rows in host memory; file: rows on disk"
    )
    planned.add_argument("--workspace-limit", type=int, default=0, help="bytes; 0: the library decides")
    planned.add_argument("--memory", type=room, metavar="SIZE", help="of a rank, such as 24GiB: also says how many classes fit")
    planned.add_argument("--gpu", type=room, metavar="SIZE", help="memory of each rank's GPU, such as 80GB: plans for GPUs")
    planned.add_argument("--cache", type=room, metavar="SIZE", help="of a rank, such as 8GiB, for the rows on disk that memory keeps")
    planned.add_argument("--disk", type=room, metavar="SIZE", help="of a rank, such as 500GB, for rows on disk: the same")
    converted = commands.add_parser(
        "convert",
        help="class centers of other trainers into a checkpoint, and those of a checkpoint out of it",
        description="Files of ranks, in their order, become a checkpoint in the directory TARGET, with optimizer state of zeros. If TARGET "
        "is a .npy or .fvecs file, a checkpoint's class centers are written to it, normalized, for a search index.",
    )
    converted.add_argument("sources", nargs="+", metavar="SOURCE", help=".npy, .safetensors, of torch.save; or a checkpoint's directory")
    converted.add_argument("target", metavar="TARGET", help="a directory; or a .npy or .fvecs file")
    converted.add_argument("--tensor", help="name of the class centers, where a file has several tables")
    converted.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="of the checkpoint")
    converted.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="of the checkpoint")
    converted.add_argument("--storage", metavar="DIR", help="a directory for rows that are larger than memory")
    converted.add_argument("--raw", action="store_true", help="write class centers as they are, not normalized")
    arguments = parser.parse_args()

    printed = []
    if arguments.prefix or arguments.cmake:
        printed.append(str(PREFIX))
    if arguments.cflags:
        printed.append(f"-I{PREFIX / 'include'}")
    if arguments.libs:
        printed.append(f"-L{PREFIX / 'lib'} -lpartialfc -Wl,-rpath,{PREFIX / 'lib'}")
    if printed:
        print(" ".join(printed))
    elif arguments.command == "info":
        print(build_info())
        print(f"{lib._name}, SONAME {SONAME}")
    elif arguments.command is not None:
        try:
            print(table(arguments) if arguments.command == "plan" else converted_to(arguments))
        except (PartialFCError, ValueError, OSError) as error:
            print(f"python -m partialfc {arguments.command}: {getattr(error, 'message', error)}", file=sys.stderr)
            return 1
    else:
        parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
