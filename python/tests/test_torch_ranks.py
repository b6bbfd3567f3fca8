"""Processes over gloo: DDP over the whole model, FSDP2, errors of one rank, Ctrl-C, a rank that is lost, other numbers of ranks."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch")

from conftest import LONGEST  # noqa: E402


def launch(folder, *modes: str, size: int = 2) -> list[str]:
    """What each rank prints; all must succeed. The first that fails ends the others, which may wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-X", "faulthandler", str(pathlib.Path(__file__).with_name("ranks.py")), str(folder), *modes]
    outputs = [folder / f"printed by rank {rank}" for rank in range(size)]
    processes = []
    try:
        for rank, output in enumerate(outputs):
            with open(output, "w") as file:
                ranked = {**environment, "RANK": str(rank)}
                processes.append(subprocess.Popen(program, env=ranked, stdout=file, stderr=subprocess.STDOUT))
        end = time.monotonic() + 2 * LONGEST
        while time.monotonic() < end and None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    printed = [output.read_text() for output in outputs]
    codes = [process.returncode for process in processes]
    assert codes == [0] * size, "\n".join(f"rank {rank}, exit {codes[rank]}\n{text}" for rank, text in enumerate(printed))
    return printed


def test_ddp_over_the_whole_model(tmp_path):
    for printed in launch(tmp_path, "sharded", "replicated"):
        assert "sharded as it should be" in printed and "replicated as it should be" in printed


def test_fsdp2(tmp_path):
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("fully_shard came with torch 2.6")
    for printed in launch(tmp_path, "fsdp backbone", "fsdp model", "fsdp anchor"):
        assert printed.count("as it should be") == 3


def test_ctrl_c_inside_a_collective_and_a_rank_that_is_lost(tmp_path):
    printed = launch(tmp_path, "interrupt", "lose")[0]
    assert "interrupted" in printed
    assert "PFC_ERROR_COMM, rank 0] from RuntimeError" in printed


def test_a_distributed_checkpoint_goes_on_with_other_ranks(tmp_path):
    """Four ranks save and go on; three load, and one, and have the same losses. Fails where torch changes what is not documented."""
    expected = losses(launch(tmp_path, "save-sharded", "save-replicated", size=4))
    for values in expected.values():
        assert len(values) == 5 and values[-1] < values[0]
    on_three = losses(launch(tmp_path, "load-sharded-sharded", "load-replicated-sharded", "load-sharded-replicated", size=3))
    on_one = losses(launch(tmp_path, "load-sharded-sharded", size=1))
    assert (len(on_three), len(on_one)) == (3, 1)
    for mode, values in [*on_three.items(), *on_one.items()]:
        assert values == pytest.approx(expected["save-" + mode.split("-")[1]], rel=1e-6), mode


def losses(printed: list[str]) -> dict[str, list[float]]:
    """Those that every rank prints, the same on all, by mode."""
    lines = {line for text in printed for line in text.splitlines() if line.startswith("losses ")}
    found = {mode: [float(value) for value in values] for _, mode, *values in map(str.split, lines)}
    assert len(found) == len(lines) > 0, printed
    return found
