"""Handles of the library: who frees them, and when."""

import ctypes
import os
import weakref

from ._library import PartialFCError, lib
from . import _abi


class State:
    """What a handle's finalizer knows of it; it must not keep the object alive."""

    __slots__ = ("address", "calls", "free", "keep", "process")

    def __init__(self, address: int, free):
        self.address = address
        self.free = free
        #: What must not be gone before the handle.
        self.keep = None
        #: Calls under way: a thread may be inside when the interpreter ends.
        self.calls = 0
        self.process = os.getpid()

    def release(self) -> None:
        address, self.address = self.address, None
        # A child of fork() has a copy of this object, but the handle is its parent's. A thread that is
        # inside a call when the interpreter ends keeps the memory it works on.
        if address and self.process == os.getpid() and not self.calls:
            self.free(address)
            self.keep = None


class Handle:
    """Owns one handle. At the interpreter's end the last made is freed first: heads, communicators, devices."""

    _what = "handle"
    _free = None

    def _own(self, address: ctypes.c_void_p) -> None:
        self._state = State(address.value, getattr(lib, self._free))
        self._finalizer = weakref.finalize(self, self._state.release)

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._state.address is None

    @property
    def _address(self) -> int:
        address = self._state.address
        if address is None:
            raise PartialFCError(_abi.PFC_ERROR_INVALID_ARGUMENT, f"this {self._what} has been closed", self._rank())
        return address

    def _rank(self) -> int | None:
        return None

    def close(self) -> None:
        """Frees the handle now instead of with the last reference. Twice is fine.

        Raises:
            PartialFCError: a thread is inside a call of it.
        """
        if self._state.calls:
            raise PartialFCError(
                _abi.PFC_ERROR_INVALID_ARGUMENT, f"this {self._what} is in a call of another thread", self._rank()
            )
        self._finalizer()

    def __reduce__(self):
        raise TypeError(f"a {self._what} cannot be copied or pickled: it is this process's, and one")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
