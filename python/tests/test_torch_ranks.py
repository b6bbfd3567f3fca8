"""Two processes over gloo: DDP over the whole model, errors of one rank, Ctrl-C, a rank that is lost."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

pytest.importorskip("torch")

from conftest import LONGEST  # noqa: E402


def launch(folder, *modes: str) -> list[str]:
    """What each rank prints; both must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-X", "faulthandler", str(pathlib.Path(__file__).with_name("ranks.py")), str(folder), *modes]
    processes = [
        subprocess.Popen(
            program, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=2 * LONGEST)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    return printed


def test_ddp_over_the_whole_model(tmp_path):
    for printed in launch(tmp_path, "sharded", "replicated"):
        assert "sharded as it should be" in printed and "replicated as it should be" in printed


def test_ctrl_c_inside_a_collective_and_a_rank_that_is_lost(tmp_path):
    printed = launch(tmp_path, "interrupt", "lose")[0]
    assert "interrupted" in printed
    assert "PFC_ERROR_COMM, rank 0] from RuntimeError" in printed
