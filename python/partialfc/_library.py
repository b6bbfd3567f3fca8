"""Finds and loads libpartialfc, and turns its statuses into exceptions."""

import ctypes
import os
import pathlib
import sys

from . import _abi

#: What the wheel holds beside the modules: include/, lib/.
PREFIX = pathlib.Path(__file__).resolve().parent
SONAME = "libpartialfc.so.0"


class PartialFCError(RuntimeError):
    """A call of the library failed.

    The exception of a function that the library called (`Comm.custom`) is its ``__cause__``.
    """

    #: PFC_ERROR_*, such as 12.
    status: int
    #: The name of the status, such as "PFC_ERROR_LABEL".
    status_name: str
    #: What failed: it names the argument, the value and the rank.
    message: str
    #: This process's rank, or None for what belongs to no rank.
    rank: int | None

    def __init__(self, status: int, message: str, rank: int | None = None):
        self.status = status
        self.status_name = lib.pfc_status_name(status).decode()
        self.message = message
        self.rank = rank
        super().__init__(f"{message} [{self.status_name}{'' if rank is None else f', rank {rank}'}]")

    def __reduce__(self):
        return type(self), (self.status, self.message, self.rank)


def _load() -> ctypes.CDLL:
    path = os.environ.get("PFC_LIBRARY") or str(PREFIX / "lib" / SONAME)
    try:
        library = ctypes.CDLL(path)
        _abi.declare(library)
    except OSError as error:
        raise ImportError(
            f"partialfc's library does not load: {error}. It is at {path}"
            f"{'' if sys.platform == 'linux' else f', and runs on Linux only, not on {sys.platform}'};"
            " PFC_LIBRARY in the environment names another"
        ) from error
    except AttributeError as error:
        raise ImportError(f"{path} is older than this package: {error}") from error
    return library


lib = _load()


def failure(status: int, rank: int | None = None) -> PartialFCError:
    """The error of the call of this thread that has just returned a status other than PFC_OK."""
    return PartialFCError(status, lib.pfc_last_error().decode(errors="replace"), rank)


def check(status: int, rank: int | None = None) -> None:
    """Raises the error of the call that has just returned a status."""
    if status:
        raise failure(status, rank)


def build_info() -> str:
    """Version, commit, target and backends of the library, as one line."""
    return lib.pfc_build_info().decode()


def version() -> str:
    """Such as "0.2.0"."""
    number = lib.pfc_version()
    return f"{number >> 16}.{number >> 8 & 255}.{number & 255}"
