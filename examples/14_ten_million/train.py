#!/usr/bin/env python3
"""Trains a head of ten million classes on one machine, kills it, and goes on; the README beside this file says how to run it."""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import partialfc

PROBES = 1_000
PHASES = ("gather", "sample", "forward", "reduce", "backward", "update")


class Identities:
    """Photos that are made up: a photo is the direction of its identity and noise, 45 degrees away from it.

    Training sees `seen` of the classes, spread over all of them; every other class is only ever a negative. So minutes are
    enough for those to be learned, while each step costs what it costs with all ten million.
    """

    def __init__(self, classes, seen, dim):
        numbers = np.random.default_rng(0)
        self.classes = numbers.choice(classes, seen, replace=False)
        self.directions = numbers.standard_normal((seen, dim), dtype=np.float32)
        self.directions /= np.linalg.norm(self.directions, axis=1, keepdims=True)

    def photos(self, numbers, chosen):
        noise = numbers.standard_normal((len(chosen), self.directions.shape[1]), dtype=np.float32)
        return self.directions[chosen] + noise / np.linalg.norm(noise, axis=1, keepdims=True)

    def batch(self, step, rows):
        """The same photos for the same step, whichever process asks."""
        numbers = np.random.default_rng([1, step])
        chosen = numbers.integers(0, len(self.classes), rows)
        return self.photos(numbers, chosen), self.classes[chosen]

    def probes(self):
        """New photos, one each of a thousand identities."""
        chosen = np.arange(min(PROBES, len(self.classes)))
        return self.photos(np.random.default_rng(2), chosen), self.classes[chosen]


def transferred():
    """Bytes that this process has read from disks and written to them."""
    lines = dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


def say(event, **facts):
    """Tells the parent process."""
    read, written = transferred()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"event": event, "peak": peak, "read": read, "written": written, **facts}), flush=True)


@contextlib.contextmanager
def timed(event):
    """Says how long its body has taken, and what the body adds to the dictionary that it gets."""
    facts = {}
    start = time.perf_counter()
    yield facts
    say(event, seconds=time.perf_counter() - start, **facts)


def train(run):
    """The process that trains. It saves half way, and goes on until it is killed; the one after it loads what was saved."""
    identities = Identities(run.classes, run.seen, run.dim)
    probes, truth = identities.probes()
    storage = {}
    if run.residency == "file":
        storage = {"residency": "file", "storage_path": run.folder, "storage_cache": run.cache}
    with timed("created"):
        head = partialfc.Head(
            run.classes,
            run.dim,
            run.batch,
            sample_rate=run.rate,
            sample_block=run.block,
            weight_dtype="bf16",
            state_dtype="bf16",
            precision=run.precision,
            **storage,
        )
    checkpoint = pathlib.Path(run.folder, "checkpoint")

    def progress(done, total):
        say("progress", done=done, total=total)

    if run.load:
        with timed("loaded"):
            head.load(checkpoint, progress=progress)

    def recall(step):
        with timed("recall") as facts:
            nearest, _ = head.top_k(probes, k=1)
            facts.update(step=step, recall=float((nearest[:, 0] == truth).mean()))

    _, first = head.read_progress()
    if not run.load:
        recall(0)
    for step in range(first, run.steps):
        x, labels = identities.batch(step, run.batch)
        with timed("step") as facts:
            loss, _ = head.step(x, labels, learning_rate=0.1)
            facts.update(step=step + 1, loss=loss)
            measured = head.metrics()
            facts.update({phase: getattr(measured, f"seconds_{phase}") for phase in PHASES})
        if step + 1 == run.steps // 2 and not run.load:
            recall(step + 1)
            with timed("saved"):
                head.save(checkpoint, progress=progress)
    recall(run.steps)


class Shown:
    """A bar on a terminal with tqdm installed, a line every ten seconds elsewhere."""

    def __init__(self, steps):
        self.steps, self.line, self.bar = steps, 0.0, None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=steps, unit="step")

    def tell(self, text, done=None):
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            if done is not None:
                self.bar.n = done
            self.bar.refresh()
        elif time.monotonic() > self.line + 10 or done == self.steps:
            self.line = time.monotonic()
            print(text if done is None else f"step {done} of {self.steps}: {text}", flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def events(process, shown):
    """What the training process says, shown on the way."""
    for line in process.stdout:
        said = json.loads(line)
        if said["event"] == "step":
            shown.tell(f"loss {said['loss']:.3f}, {said['seconds']:.2f} s, peak {size(said['peak'])}", said["step"])
        elif said["event"] == "progress":
            shown.tell(f"checkpoint: {size(said['done'])} of {size(said['total'])}")
        elif said["event"] == "recall":
            shown.tell(f"recall {100 * said['recall']:.1f} % of the probes, {said['seconds']:.0f} s")
        yield said


def start(run, load):
    words = [sys.executable, __file__, "--worker", json.dumps({**vars(run), "load": load})]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def demonstrate(run):
    """Everything that two training processes have said: the first is killed some steps after it has saved."""
    shown = Shown(run.steps)
    told = []
    with start(run, load=False) as first:
        saved = None
        for said in events(first, shown):
            told.append(said)
            if said["event"] == "saved":
                saved = run.steps // 2
            elif said["event"] == "step" and saved is not None and said["step"] >= min(saved + run.after, run.steps - 1):
                first.send_signal(signal.SIGKILL)
                break
    if first.returncode != -signal.SIGKILL:
        raise SystemExit(f"the training process ended by itself, with status {first.returncode}")
    told.append({"event": "killed", "step": told[-1]["step"]})
    with start(run, load=True) as second:
        told.extend(events(second, shown))
    shown.close()
    if second.returncode != 0:
        raise SystemExit(f"the second training process failed with status {second.returncode}")
    return told


def size(count):
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            break
        count /= 1000
    else:
        unit = "TB"
    return f"{count:.4g} {unit}"


def named(told, event):
    return [said for said in told if said["event"] == event]


def report(run, told):
    """The lines that a person reads, after a check that nothing was lost."""
    created, loaded, saved = (named(told, event)[0] for event in ("created", "loaded", "saved"))
    at = told.index(named(told, "killed")[0])
    before = {said["step"]: said["loss"] for said in named(told[:at], "step") if said["step"] > run.steps // 2}
    after = {said["step"]: said["loss"] for said in named(told[at:], "step")}
    for step, loss in before.items():
        if after[step] != loss:
            raise SystemExit(f"step {step} has loss {loss!r} before the kill and {after[step]!r} after it")
    last = max(before)
    steps = named(told, "step")
    # The first steps of each process write their rows for the first time and fill its memory.
    median = {name: float(np.median([said[name] for said in steps])) for name in ("seconds", *PHASES)}
    moved = [size((told[at - 1][way] - told[0][way])) for way in ("read", "written")]
    recalls = [f"{100 * said['recall']:.1f} % after step {said['step']}" for said in named(told, "recall")]
    searched = np.median([said["seconds"] for said in named(told, "recall")])
    return [
        f"{run.classes:,} classes of dimension {run.dim}, rate {run.rate:g}, batch {run.batch}, rows in {run.residency}",
        f"  made        {created['seconds']:.2f} s",
        f"  a step      {median['seconds']:.3f} s: " + ", ".join(f"{phase} {median[phase]:.3f}" for phase in PHASES),
        f"  loss        {steps[0]['loss']:.3f} at first, {steps[-1]['loss']:.3f} at last",
        f"  recall      {', '.join(recalls)}; {searched:.0f} s for {min(PROBES, run.seen):,} probes",
        f"  save        {saved['seconds']:.1f} s, load {loaded['seconds']:.1f} s",
        f"  SIGKILL     after step {last}; loaded step {run.steps // 2}, and step {last} has the same loss again: {after[last]!r}",
        f"  peak        {size(max(said['peak'] for said in told if 'peak' in said))} of memory",
        f"  disk        the first process read {moved[0]} and wrote {moved[1]}, its checkpoint included",
    ]


def draw(path, results):
    """Loss, recall and bytes over steps: a color for each rate, and a broad line in memory, which a file's covers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, recalls, moved) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rates = list(dict.fromkeys(run.rate for run, _ in results))
    for run, told in results:
        color = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")[rates.index(run.rate) % 4]
        look = {"color": color, "label": f"rate {run.rate:g}, in {'a file' if run.residency == 'file' else 'memory'}"}
        look |= {"linewidth": 6, "alpha": 0.3} if run.residency == "memory" else {"linewidth": 1.5}
        # The steps between the save and the kill were done twice, with the same losses.
        by_step = {said["step"]: said["loss"] for said in named(told, "step")}
        losses.plot(by_step.keys(), by_step.values(), **look)
        recalled = named(told, "recall")
        recalls.plot([r["step"] for r in recalled], [100 * r["recall"] for r in recalled], "o-", **look)
        steps = named(told[: told.index(named(told, "killed")[0])], "step")
        steps = [said for said in steps if said["step"] <= run.steps // 2]
        start = steps[0]
        traffic = [(said["read"] + said["written"] - start["read"] - start["written"]) / 1e9 for said in steps]
        moved.plot([said["step"] for said in steps], traffic, **look)
    losses.set(title="Loss", xlabel="step", ylabel="mean loss of the batch")
    recalls.set(title="Probes recognized among all classes", xlabel="step", ylabel="%", ylim=(-3, 103))
    moved.set(title="Disk traffic before the save", xlabel="step", ylabel="GB read and written")
    for axes in (losses, recalls, moved):
        axes.grid(color="#e0e0e0")
        axes.spines[["top", "right"]].set_visible(False)
    losses.legend(frameon=False)
    figure.savefig(path, dpi=110)


def arguments():
    parser = argparse.ArgumentParser(
        description="Trains a head of ten million classes on one machine: in memory or from a file, killed half way and continued.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--classes", type=int, default=10_000_000, help="num_classes")
    parser.add_argument("--dim", type=int, default=512, help="embedding_dim")
    parser.add_argument("--batch", type=int, default=128, help="photos in a step")
    parser.add_argument("--steps", type=int, default=60, help="steps; the head is saved half way")
    parser.add_argument("--after", type=int, default=5, help="steps between the save and SIGKILL")
    parser.add_argument("--rate", type=float, nargs="+", default=[0.01], help="sample_rate; a run for each")
    parser.add_argument("--residency", choices=("memory", "file"), nargs="+", default=["file"], help="where rows are; a run for each")
    parser.add_argument("--cache", type=int, default=0, help="storage_cache of runs from a file, in bytes")
    parser.add_argument("--precision", choices=("f32", "half"), default="f32", help="what the head multiplies")
    parser.add_argument("--block", type=int, default=16, help="sample_block")
    parser.add_argument("--seen", type=int, default=2_000, help="classes that have photos")
    parser.add_argument("--storage", type=pathlib.Path, default=pathlib.Path("out"), help="where a run has its folder for rows and checkpoint")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/ten_million"), help="folder for results.json and the picture")
    return parser.parse_args()


def main():
    if sys.argv[1:2] == ["--worker"]:
        train(argparse.Namespace(**json.loads(sys.argv[2])))
        return
    wanted = arguments()
    if not (2 <= wanted.steps and 1 <= wanted.seen <= wanted.classes):
        raise SystemExit("--steps must be at least 2, and --seen 1 to --classes")
    wanted.out.mkdir(parents=True, exist_ok=True)
    wanted.storage.mkdir(parents=True, exist_ok=True)
    results = []
    for residency in wanted.residency:
        for rate in wanted.rate:
            with tempfile.TemporaryDirectory(prefix="ten_million-", dir=wanted.storage) as folder:
                names = ("classes", "dim", "batch", "steps", "after", "block", "precision", "cache", "seen")
                run = argparse.Namespace(**{name: getattr(wanted, name) for name in names}, rate=rate, residency=residency, folder=folder)
                told = demonstrate(run)
            print("\n".join(report(run, told)), flush=True)
            results.append((run, told))
    with (wanted.out / "results.json").open("w", encoding="utf-8") as file:
        json.dump([{**vars(run), "told": [said for said in told if said["event"] != "progress"]} for run, told in results], file)
    try:
        draw(wanted.out / "training.png", results)
    except ImportError:
        print("No picture: that needs matplotlib (pip install matplotlib)")


if __name__ == "__main__":
    main()
