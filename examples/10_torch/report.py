"""What a training run shows of itself: a bar or lines, measurements as JSON lines, a picture."""

import contextlib
import json
import sys
import time


class Report:
    """Takes the measurements of each step, on rank 0.

    On a terminal with tqdm installed it shows a bar; otherwise a line for each interval.

    Args:
        steps: steps of the whole run.
        every: steps of an interval.
        metrics: file that gets a line of JSON for each interval; None: none. A line is a flat dictionary of numbers, as the
            writers of TensorBoard and of other trackers take them.
        plot: file of the picture, such as .png or .svg; None: none.
    """

    def __init__(self, steps, every=20, metrics=None, plot=None):
        if plot is not None:
            try:
                import matplotlib  # noqa: F401
            except ImportError:
                raise SystemExit("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
        self.steps, self.every, self.plot = steps, every, plot
        self.history: list[dict] = []
        self.start = time.perf_counter()
        self.images = 0
        self.file = None
        if metrics is not None:
            metrics.parent.mkdir(parents=True, exist_ok=True)
            self.file = metrics.open("w", encoding="utf-8")
        self.bar = None
        # A log of a bar has thousands of columns.
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=steps, unit="step")

    def step(self, images, **measured):
        """Takes what one step has measured of its `images`."""
        self.images += images
        step = len(self.history)
        seconds = time.perf_counter() - self.start
        self.history.append({"step": step, **measured, "images_per_second": self.images / seconds})
        last = self.history[-1]
        if self.bar is not None:
            self.bar.update()
        if step % self.every != 0 and step != self.steps - 1:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {last['loss']:.3f}, top-1 {last['top1']:.2f}, {last['images_per_second']:.0f} images/s")
        else:
            print(
                f"step {step:3}  loss {last['loss']:.3f}  top-1 {last['top1']:.2f}  target cosine {last['target_cosine']:.2f}  "
                f"{last['images_per_second']:.0f} images/s",
                flush=True,
            )
        if self.file is not None:
            print(json.dumps(last), file=self.file, flush=True)

    def close(self):
        """Ends the bar and the file, and draws the picture."""
        if self.bar is not None:
            self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.plot is not None:
            draw(self.history, self.plot)


def smooth(values, window):
    """Means over the steps around each."""
    half = window // 2
    parts = [values[max(0, middle - half) : middle + half + 1] for middle in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw(history, path):
    """Loss, top-1 and learning rate by steps."""
    import matplotlib

    matplotlib.use("Agg")  # Draws to files, with no display.
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    steps = [each["step"] for each in history]
    window = max(len(steps) // 10, 1)
    look = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.8}
    with pyplot.rc_context(look):
        figure, axes = pyplot.subplot_mosaic(
            [["loss", "top1"], ["loss", "learning_rate"]], figsize=(9, 4.5), layout="constrained", width_ratios=[3, 2]
        )
        panels = (("loss", "Loss", "C0"), ("top1", "Top-1 within the sample", "C2"), ("learning_rate", "Learning rate", "C1"))
        for name, title, color in panels:
            panel, values = axes[name], [each[name] for each in history]
            if name == "learning_rate" or window == 1:
                panel.plot(steps, values, color=color)
            else:
                panel.plot(steps, values, color=color, alpha=0.35, linewidth=1, label="each step")
                panel.plot(steps, smooth(values, window), color=color, label=f"mean of {2 * (window // 2) + 1} steps")
            panel.set_title(title, loc="left", fontsize=11)
            panel.set_xlim(0, len(steps))
            panel.set_ylim(bottom=0)
        if window > 1:
            axes["loss"].legend(frameon=False)
        axes["top1"].set_ylim(0, 1.02)
        axes["top1"].yaxis.set_major_formatter(PercentFormatter(1))
        axes["top1"].tick_params(labelbottom=False)
        for name in ("loss", "learning_rate"):
            axes[name].set_xlabel("Step")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
