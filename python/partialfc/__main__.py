"""What a head takes, what this build is, and the flags that compile C and C++ programs against it.

    python -m partialfc plan --classes 10_000_000 --ranks 8 --batch 128 --rate 0.1
    python -m partialfc info
    cc program.c $(python -m partialfc --cflags --libs) -o program
    cmake -S . -B build -DCMAKE_PREFIX_PATH="$(python -m partialfc --cmake)"
"""

import argparse
import sys

from . import PartialFCError, __version__, build_info, plan
from ._library import PREFIX, SONAME, lib

#: Rows of the table of `plan`: a field of Plan, and what it is.
_MEMORY = (
    ("weight_bytes", "class centers"),
    ("state_bytes", "optimizer state"),
    ("activation_bytes", "embeddings, gradients"),
    ("probability_bytes", "softmax numerators"),
    ("total_bytes", "memory of a rank"),
)
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


def table(arguments) -> str:
    """Memory and traffic of the placements, side by side."""
    columns = [("sharded, all classes", "sharded", 1.0), ("replicated, all classes", "replicated", 1.0)]
    if arguments.rate < 1:
        columns.insert(1, (f"sharded, rate {arguments.rate:g}", "sharded", arguments.rate))
        columns.append((f"replicated, rate {arguments.rate:g}", "replicated", arguments.rate))
    # Nothing is written there: a plan makes no file.
    storage = {"residency": "file", "storage_path": "."} if arguments.residency == "file" else {}
    plans = [
        plan(
            arguments.classes,
            arguments.dim,
            ranks=arguments.ranks,
            batch=arguments.batch,
            placement=placement,
            sample_rate=rate,
            optimizer=arguments.optimizer,
            row_update=arguments.row_update,
            precision=arguments.precision,
            workspace_limit=arguments.workspace_limit,
            weight_dtype=arguments.dtype,
            state_dtype=arguments.dtype,
            **storage,
        )
        for _, placement, rate in columns
    ]
    rows = [[""] + [title for title, _, _ in columns]]
    rows.append(["classes on a rank"] + [f"{p.shard_rows:,}" for p in plans])
    rows.append(["classes in a step"] + [f"{p.sample_capacity:,}" for p in plans])
    for field, what in _MEMORY + (_STORAGE if storage else ()) + _TRAFFIC:
        rows.append([what] + [size(getattr(p, field)) for p in plans])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


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
        description="Memory is that of the CPU device, whose precision is f32. Traffic is what one rank passes to collectives.",
    )
    planned.add_argument("--classes", type=int, required=True, help="num_classes, over all ranks")
    planned.add_argument("--dim", type=int, default=512, help="embedding_dim (%(default)s)")
    planned.add_argument("--ranks", type=int, default=1, help="number of ranks (%(default)s)")
    planned.add_argument("--batch", type=int, default=128, help="rows on each rank (%(default)s)")
    planned.add_argument("--rate", type=float, default=1.0, help="sample_rate (%(default)s)")
    planned.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    planned.add_argument("--row-update", choices=("lazy", "dense"), default="lazy")
    planned.add_argument("--precision", choices=("auto", "f32", "half"), default="auto", help="half: the traffic of a GPU")
    planned.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="of class centers and optimizer state")
    planned.add_argument("--residency", choices=("device", "file"), default="device", help="file: rows on disk")
    planned.add_argument("--workspace-limit", type=int, default=0, help="bytes; 0: the library decides")
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
    elif arguments.command == "plan":
        try:
            print(table(arguments))
        except (PartialFCError, ValueError) as error:
            print(f"python -m partialfc plan: {getattr(error, 'message', error)}", file=sys.stderr)
            return 1
    else:
        parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
