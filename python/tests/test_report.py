"""What examples/10_torch shows of a run: lines, a bar, JSON lines, a picture."""

import importlib.util
import json
import pathlib
import sys

import pytest

SOURCE = pathlib.Path(__file__).parents[2] / "examples/10_torch/report.py"
NAMES = {"step", "loss", "top1", "target_cosine", "learning_rate", "images_per_second"}


@pytest.fixture
def report():
    spec = importlib.util.spec_from_file_location("report", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(report, steps, **options):
    shown = report.Report(steps, **options)
    for step in range(steps):
        shown.step(8, loss=10.0 / (step + 1), top1=step / steps, target_cosine=0.1, learning_rate=0.1 * (1 - step / steps))
    shown.close()


def test_lines_and_measurements(report, tmp_path, capsys):
    run(report, 12, every=5, metrics=tmp_path / "new" / "metrics.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 5, 10, 11]  # The last step, too.
    assert all(line.keys() == NAMES for line in lines)
    assert lines[1]["loss"] == pytest.approx(10 / 6)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and printed[0].startswith("step   0  loss 10.000  top-1 0.00")


@pytest.mark.parametrize("installed", [True, False])
def test_a_terminal_has_a_bar_where_tqdm_is(report, monkeypatch, capsys, installed):
    if installed:
        pytest.importorskip("tqdm", reason="tqdm is not installed")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(report, 4, every=2)
    shown = capsys.readouterr()
    assert ("4/4" in shown.err and "loss 2.500" in shown.err) == installed
    assert ("step   3" in shown.out) != installed


@pytest.mark.parametrize("steps", [1, 40])
def test_a_picture(report, tmp_path, steps):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run(report, steps, plot=tmp_path / "new" / "run.png")
    run(report, steps, plot=tmp_path / "run.svg")
    assert (tmp_path / "new" / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "run.svg").read_text()


def test_no_picture_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="--plot needs matplotlib, which is not installed: pip install matplotlib"):
        report.Report(4, plot=tmp_path / "run.png")
    run(report, 4)


def test_means(report):
    assert report.smooth([1, 2, 3, 10], 1) == [1, 2, 3, 10]
    assert report.smooth([1, 2, 3, 10], 2) == [1.5, 2, 5, 6.5]
