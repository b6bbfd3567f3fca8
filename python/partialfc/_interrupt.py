"""Signals while the library is in a call, such as Ctrl-C while a collective waits for other ranks.

Python runs its signal handlers between its own instructions, so one that waits in the library would not be
interrupted before the library's own timeout. A thread is told of the signal at once, by `signal.set_wakeup_fd`.
If the main thread is in the same call still after a second, its communicator is aborted: the call returns, and
the handler raises KeyboardInterrupt.

Where the library calls functions of Python's, handlers would run inside the call, in these functions. One that
raises where such a function begins raises into ctypes, which prints the exception and returns an undefined
status to the library. So `later` makes the handlers wait until the call has returned, as in all other calls.
"""

import _signal  # signal.getsignal takes thirty times as long for all signals.
import contextlib
import ctypes
import os
import signal
import socket
import threading
import weakref

from ._library import lib

#: Long enough for a step that is not stuck: its head remains usable.
GRACE = 1.0

_lock = threading.Lock()
_watching = None
#: Communicators that the main thread may be waiting in.
_comms: "weakref.WeakSet" = weakref.WeakSet()
MAIN = threading.main_thread().ident
_signals = [int(number) for number in signal.valid_signals()]
_libc = ctypes.CDLL(None)
#: Bytes of the C library's struct sigaction, or more.
_SIGACTION = 256
#: Whether the main thread is in `later`.
_inside = False
#: (handler, number, frame) of what arrived meanwhile.
_arrived: list = []


class _Later:
    """Stands in for a handler of the program's."""

    def __init__(self, handler):
        self.handler = handler

    def __call__(self, number, frame):
        if _inside:
            _arrived.append((self.handler, number, frame))
        else:
            self.handler(number, frame)


def _handler(number: int):
    """The program's."""
    handler = _signal.getsignal(number)
    return handler.handler if isinstance(handler, _Later) else handler


def _set_handler(number: int, handler) -> None:
    """Sets Python's handler alone: signal.signal also resets the system's, which may be faulthandler's, and its flags."""
    before = ctypes.create_string_buffer(_SIGACTION)
    _libc.sigaction(number, None, before)
    _signal.signal(number, handler)
    _libc.sigaction(number, before, None)


def later(function, *arguments) -> int:
    """Calls a function of the library's; handlers of signals run when it has returned."""
    global _inside
    if threading.get_ident() != MAIN or _inside:
        return function(*arguments)
    handlers = {number: handler for number in _signals if callable(handler := _handler(number))}
    try:
        for number, handler in handlers.items():
            _set_handler(number, _Later(handler))
        _inside = True
        return function(*arguments)
    finally:
        try:
            for number, handler in handlers.items():
                if isinstance(_signal.getsignal(number), _Later):  # The function may have set another.
                    _set_handler(number, handler)
        finally:
            _inside = False
            if _arrived:
                _run_arrived()


def _run_arrived() -> None:
    """Runs them in their order, also where one of them raises; the last exception is raised."""
    arrived = _arrived[:]
    _arrived.clear()
    with contextlib.ExitStack() as stack:
        for handler, number, frame in reversed(arrived):
            stack.callback(handler, number, frame)


def watch(comm) -> None:
    """Lets Ctrl-C end the calls of a communicator, if the program has left SIGINT to Python."""
    global _watching
    _comms.add(comm)
    with _lock:
        if _watching == os.getpid() or threading.current_thread() is not threading.main_thread():
            return
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        try:
            earlier = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        except ValueError:  # Not the main interpreter.
            return
        if earlier != -1:  # An event loop's. It has its own way with signals.
            signal.set_wakeup_fd(earlier)
            return
        _watching = os.getpid()
        threading.Thread(target=_wait, args=(receiver, sender), name="partialfc-interrupt", daemon=True).start()


def _wait(receiver: socket.socket, _sender: socket.socket) -> None:
    while numbers := receiver.recv(64):
        if signal.SIGINT not in numbers or _handler(signal.SIGINT) is not signal.default_int_handler:
            continue
        inside = [(comm, comm._waiting) for comm in list(_comms) if comm._waiting]
        if not inside:
            continue
        threading.Event().wait(GRACE)
        for comm, call in inside:
            if comm._waiting == call and comm._state.address:
                lib.pfc_comm_abort(comm._state.address)
