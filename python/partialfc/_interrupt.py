"""Ctrl-C while a collective waits for other ranks.

Python runs its signal handlers between its own instructions, so one that waits in the library would not be
interrupted before the library's own timeout. A thread is told of the signal at once, by `signal.set_wakeup_fd`.
If the main thread is in the same call still after a second, its communicator is aborted: the call returns, and
the handler raises KeyboardInterrupt.
"""

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
        if signal.SIGINT not in numbers or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            continue
        inside = [(comm, comm._waiting) for comm in list(_comms) if comm._waiting]
        if not inside:
            continue
        threading.Event().wait(GRACE)
        for comm, call in inside:
            if comm._waiting == call and comm._state.address:
                lib.pfc_comm_abort(comm._state.address)
