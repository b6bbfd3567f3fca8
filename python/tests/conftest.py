"""What the tests share: ranks that are threads, programs that are processes, and arrays of other kinds."""

import ctypes
import subprocess
import sys
import threading

import numpy as np
import pytest

import partialfc

DIM = 8
CLASSES = 20
#: A process that runs longer is taken to hang.
LONGEST = 120


def batch(rows: int = 6, seed: int = 0, dim: int = DIM, classes: int = CLASSES):
    """Embeddings and labels."""
    numbers = np.random.default_rng(seed)
    return numbers.standard_normal((rows, dim), dtype=np.float32), numbers.integers(0, classes, rows)


def make(**options) -> partialfc.Head:
    return partialfc.Head(CLASSES, DIM, 16, device=partialfc.Device.cpu(1), **options)


@pytest.fixture
def head():
    with make() as head:
        yield head


def on_ranks(function, size: int = 2, comms=None) -> list:
    """What `function(comm)` returns or raises on each rank; the ranks are threads."""
    comms = partialfc.Comm.threads(size) if comms is None else comms
    results = [None] * len(comms)

    def run(rank):
        try:
            results[rank] = function(comms[rank])
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(comms))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST)
        assert not thread.is_alive(), "a rank hangs"
    return results


def run_python(program: str, *arguments: str, code: int = 0) -> str:
    """What a program of its own process prints; it must end with `code`."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program, *arguments], capture_output=True, text=True, timeout=LONGEST, check=False
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


class OnlyDlpack:
    """An array that tells of itself by DLPack alone, of the version before 1 if so wanted."""

    def __init__(self, array: np.ndarray, old: bool = False):
        self.array = array
        self.old = old
        self.taken = 0

    def __dlpack__(self, **arguments):
        self.taken += 1
        if self.old:
            if "max_version" in arguments:
                raise TypeError("unexpected keyword argument 'max_version'")
            return self.array.__dlpack__()
        assert arguments["max_version"] == (1, 0)
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array_namespace__(self):
        return np

    dtype = property(lambda self: self.array.dtype)
    device = "cpu"


class OnGpu:
    """Says that its memory is a GPU's."""

    def __init__(self, shape, typestr, stream=None):
        self.memory = ctypes.create_string_buffer(4096)
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (ctypes.addressof(self.memory), False),
            "shape": shape,
            "typestr": typestr,
            "stream": stream,
        }
