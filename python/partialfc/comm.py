"""Communicators: the ranks of a head, and what carries their messages."""

import ctypes
import dataclasses
import itertools
import threading
from collections.abc import Callable

import numpy as np

from . import _abi, _interrupt
from ._arrays import Reader, _NAMES
from ._handles import Handle
from ._library import check, failure, lib
from .device import Device, _uint32

_OPS = {"sum": _abi.PFC_SUM, "max": _abi.PFC_MAX}
_OP_NAMES = {code: name for name, code in _OPS.items()}
_REDUCED = (_abi.PFC_F32, _abi.PFC_F64, _abi.PFC_I32, _abi.PFC_I64)
_calls = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Calls and bytes of each operation since the communicator was made.

    Bytes are what this rank passes to an operation: its own block of an all_gather, the buffer of an
    all_reduce or broadcast, the whole input of a reduce_scatter.
    """

    all_gather_calls: int
    all_gather_bytes: int
    all_reduce_calls: int
    all_reduce_bytes: int
    reduce_scatter_calls: int
    reduce_scatter_bytes: int
    broadcast_calls: int
    broadcast_bytes: int
    barrier_calls: int


class Comm(Handle):
    """One rank of a group of ranks: `Comm.self`, `Comm.threads`, `Comm.custom`, `Comm.nccl`.

    All ranks make the same calls in the same order. Arrays are in host memory, contiguous, and may be NumPy's,
    torch's or those of DLPack. After a failed collective the communicator is at its end.
    """

    _what = "communicator"
    _free = "pfc_comm_free"

    #: This rank, 0 to size - 1.
    rank: int
    #: Number of ranks.
    size: int

    def __init__(self, address: ctypes.c_void_p, keep=(), raised: list | None = None):
        self._own(address)
        # Functions of Python that the library calls live until the last handle that may call them is freed.
        self._state.keep = keep
        self._raised = [] if raised is None else raised
        self._has_functions = raised is not None
        self.rank = lib.pfc_comm_rank(address)
        self.size = lib.pfc_comm_size(address)
        self._reader = Reader(self.rank, None, 0)
        #: The number of the call that the main thread is in, or 0.
        self._waiting = 0
        if self.size > 1:
            _interrupt.watch(self)

    @classmethod
    def self(cls) -> "Comm":
        """One rank."""
        out = ctypes.c_void_p()
        check(lib.pfc_comm_self(ctypes.byref(out)))
        return cls(out)

    @classmethod
    def threads(cls, count: int) -> "list[Comm]":
        """Ranks that are threads of this process, 1 to 4096: one communicator for each, in rank order.

        Calls of the library let other threads of Python run.
        """
        out = (ctypes.c_void_p * max(_uint32("count", count), 1))()
        check(lib.pfc_comm_threads(count, out))
        return [cls(ctypes.c_void_p(address)) for address in out]

    @classmethod
    def custom(
        cls,
        rank: int,
        size: int,
        all_gather: Callable[[np.ndarray, np.ndarray], None],
        all_reduce: Callable[[np.ndarray, np.ndarray, str], None],
        *,
        reduce_scatter: Callable[[np.ndarray, np.ndarray, str], None] | None = None,
        broadcast: Callable[[np.ndarray, int], None] | None = None,
        barrier: Callable[[], None] | None = None,
        abort: Callable[[], None] | None = None,
    ) -> "Comm":
        """Ranks that talk through functions of the caller's.

        The arrays that a function gets are the library's memory, for the time of the call. What is sent must not
        be changed; it may lie in what is received. An exception ends the communicator; the call of the library
        raises `PartialFCError` from it. Handlers of signals run when the call of the library has returned, also those
        that raise; Ctrl-C ends a wait by `abort`.

        Args:
            all_gather: `(send, recv)`, bytes: (n,) of this rank to (size, n), in rank order.
            all_reduce: `(send, recv, op)`: (n,) float32, float64, int32 or int64, op "sum" or "max". The same
                bits on every rank.
            reduce_scatter: `(send, recv, op)`: (size, n) to (n,), the rank's own row of the sum.
            broadcast: `(buffer, root)`, bytes.
            barrier: returns when all ranks have called it.
            abort: makes a running operation raise; called from another thread. Without it an operation that
                hangs cannot be ended, neither by the timeout nor by Ctrl-C.
        """
        raised: list = []
        fields = dict(_abi.pfc_comm_ops._fields_)

        def gather(_, send, recv, count, stream):
            all_gather(_array(send, (count,), "|u1"), _array(recv, (size, count), "|u1"))

        def reduce(_, send, recv, count, dtype, op, stream):
            all_reduce(_array(send, (count,), _TYPES[dtype]), _array(recv, (count,), _TYPES[dtype]), _OP_NAMES[op])

        def scatter(_, send, recv, count, dtype, op, stream):
            kind = _TYPES[dtype]
            reduce_scatter(_array(send, (size, count), kind), _array(recv, (count,), kind), _OP_NAMES[op])

        def copy(_, buffer, count, root, stream):
            broadcast(_array(buffer, (count,), "|u1"), root)

        def meet(_):
            barrier()

        def end(_):
            abort()

        ops = _abi.pfc_comm_ops()
        check(lib.pfc_comm_ops_init_sized(ctypes.byref(ops), ctypes.sizeof(ops)))
        ops.rank, ops.size = _uint32("rank", rank), _uint32("size", size)
        keep = []
        for name, given, function in (
            ("all_gather", all_gather, gather),
            ("all_reduce", all_reduce, reduce),
            ("reduce_scatter", reduce_scatter, scatter),
            ("broadcast", broadcast, copy),
            ("barrier", barrier, meet),
            ("abort", abort, end),
        ):
            if given is None:
                continue
            if not callable(given):
                raise TypeError(f"{name} is a {type(given).__name__} on rank {rank}; it must be a function")
            callback = fields[name](_kept(function, raised))
            setattr(ops, name, callback)
            keep.append(callback)
        out = ctypes.c_void_p()
        check(lib.pfc_comm_custom(ctypes.byref(ops), ctypes.byref(out)), rank)
        return cls(out, keep, raised)

    @classmethod
    def nccl(cls, unique_id: bytes, rank: int, size: int, device: Device) -> "Comm":
        """Ranks that have a GPU each, over NCCL 2.18 or later, which is loaded now. Collective.

        Args:
            unique_id: 128 bytes of `nccl_unique_id()` on one rank, sent to all by the trainer.
            device: this rank's GPU.

        Raises:
            PartialFCError: UNSUPPORTED without NCCL, naming what was looked for; TIMEOUT after 10 minutes.
        """
        if len(unique_id) != 128:
            raise ValueError(f"unique_id has {len(unique_id)} bytes on rank {rank}; it must have 128")
        out = ctypes.c_void_p()
        code = lib.pfc_comm_nccl(bytes(unique_id), _uint32("rank", rank), _uint32("size", size), device._address, ctypes.byref(out))
        check(code, rank)
        return cls(out)

    def all_gather(self, send, recv) -> None:
        """Gathers equal blocks from all ranks. Collective.

        Args:
            send: any array of n elements.
            recv: of size * n elements of the same type, written in rank order.
        """
        send = self._reader.flat(send, "send")
        recv = self._reader.flat(recv, "recv", code=send.code, count=send.count * self.size, write=True)
        self._call(lib.pfc_comm_all_gather, self._address, send.address, recv.address, send.bytes)

    def all_reduce(self, array, op: str = "sum") -> None:
        """Combines an array over all ranks, in place; every rank gets the same bits. Collective.

        Args:
            array: float32, float64, int32 or int64; as large on every rank.
            op: "sum" or "max".
        """
        view = self._reader.flat(array, "array", codes=_REDUCED, write=True)
        self._call(lib.pfc_comm_all_reduce, self._address, view.address, view.address, view.count, view.code, self._op(op))

    def reduce_scatter(self, send, recv, op: str = "sum") -> None:
        """Combines an array over all ranks; rank r gets the r-th part of it. Collective.

        Args:
            send: size * n elements, float32, float64, int32 or int64.
            recv: n elements of the same type, written.
            op: "sum" or "max".
        """
        recv = self._reader.flat(recv, "recv", codes=_REDUCED, write=True)
        send = self._reader.flat(send, "send", code=recv.code, count=recv.count * self.size)
        self._call(lib.pfc_comm_reduce_scatter, self._address, send.address, recv.address, recv.count, recv.code, self._op(op))

    def broadcast(self, array, root: int = 0) -> None:
        """Copies an array from rank `root` to all. Collective."""
        view = self._reader.flat(array, "array", write=self.rank != root)
        self._call(lib.pfc_comm_broadcast, self._address, view.address, view.bytes, _uint32("root", root))

    def barrier(self) -> None:
        """Returns once all ranks have called it. Collective."""
        self._call(lib.pfc_comm_barrier, self._address)

    def traffic(self) -> Traffic:
        """Calls and bytes of this rank so far."""
        out = _abi.pfc_traffic()
        check(lib.pfc_comm_traffic(self._address, ctypes.byref(out)), self.rank)
        return Traffic(*(getattr(out, field) for field, _ in out._fields_))

    def set_timeout(self, seconds: float) -> None:
        """Sets the longest time that a later wait of this rank may take: 0.001 s or more, 600 s unless set."""
        check(lib.pfc_comm_set_timeout(self._address, max(int(seconds * 1000), 0)), self.rank)

    def abort(self) -> None:
        """Ends the communicator: running and later operations fail with ABORTED. From any thread."""
        check(_interrupt.later(lib.pfc_comm_abort, self._address), self.rank)

    def __repr__(self) -> str:
        return f"<partialfc.Comm, rank {self.rank} of {self.size}{', closed' if self.closed else ''}>"

    def _rank(self):
        return self.rank

    def _op(self, op: str) -> int:
        try:
            return _OPS[op]
        except KeyError:
            raise ValueError(f"op is {op!r}{self._reader.at}; it must be 'sum' or 'max'") from None

    def _run(self, function, *arguments, later: bool = False) -> int:
        """The status of a collective call, which Ctrl-C may end. Handlers of signals wait if the library calls Python in it."""
        if later or self._has_functions:
            self._raised.clear()
            return _interrupt.later(self._watched, function, *arguments)
        return self._watched(function, *arguments)

    def _watched(self, function, *arguments) -> int:
        """Lets `_interrupt` know that the main thread may be waiting."""
        try:
            if self.size > 1 and threading.get_ident() == _interrupt.MAIN:
                self._waiting = next(_calls)
            return function(*arguments)
        finally:
            self._waiting = 0

    def _call(self, function, *arguments) -> None:
        """Calls a collective."""
        state = self._state
        state.calls += 1
        try:
            status = self._run(function, *arguments)
        finally:
            state.calls -= 1
        if status:
            raise self._failure(status)

    def _failure(self, status: int) -> BaseException:
        """The error of the call that has just returned a status, from what a function of the caller's raised."""
        error = failure(status, self.rank)
        if self._raised:
            cause = self._raised[0]
            self._raised.clear()
            if not isinstance(cause, Exception):  # SystemExit
                return cause
            error.__cause__ = cause
        return error


def nccl_unique_id() -> bytes:
    """The id that all ranks of one NCCL communicator share, 128 bytes. Call it on one rank and send it to the others.

    Raises:
        PartialFCError: UNSUPPORTED without NCCL; COMM if NCCL finds no network interface.
    """
    out = ctypes.create_string_buffer(128)
    check(lib.pfc_nccl_unique_id(out))
    return out.raw


_TYPES = {code: np.dtype(_NAMES[code]).str for code in _REDUCED}


class _Memory:
    """Memory of the library's that NumPy shows."""

    __slots__ = ("__array_interface__",)


def _array(address: int, shape: tuple, typestr: str) -> np.ndarray:
    memory = _Memory()
    memory.__array_interface__ = {"version": 3, "data": (address, False), "shape": shape, "typestr": typestr}
    return np.asarray(memory)


def _kept(function, raised: list):
    """Keeps an exception, which ctypes would print and forget, and tells the library of it."""

    def call(*arguments):
        try:
            function(*arguments)
            return 0
        except BaseException as error:  # noqa: B902, it is raised where the library returns
            raised.append(error)
            return 1

    return call
