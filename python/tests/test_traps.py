"""What can go wrong round a library that is called from Python: forks, ends of programs, Ctrl-C, two threads."""

import gc
import os
import threading

import pytest

import partialfc
from conftest import batch, make, on_ranks, run_python

PROGRAM = """
import os, signal, sys, threading, time
import numpy as np, partialfc
# What a shell runs in the background ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
embeddings, labels = np.ones((4, 8), np.float32), np.arange(4)
def make(**options):
    return partialfc.Head(20, 8, 16, device=partialfc.Device.cpu(1), **options)
"""


def test_a_closed_head(head):
    head.close()
    head.close()
    assert head.closed and "closed" in repr(head)
    for call in (lambda: head.step(*batch(), 0.1), lambda: head.update(0.1), head.read_centers, head.metrics, head.wait):
        with pytest.raises(partialfc.PartialFCError, match=r"this head has been closed \[PFC_ERROR_INVALID_ARGUMENT, rank 0"):
            call()


def test_a_closed_device_and_communicator():
    device, comm = partialfc.Device.cpu(1), partialfc.Comm.self()
    head = partialfc.Head(20, 8, 16, device=device, comm=comm)
    device.close()
    comm.close()
    # The head keeps them alive.
    head.step(*batch(), 0.1)
    with pytest.raises(partialfc.PartialFCError, match="this device has been closed"):
        partialfc.Head(20, 8, 16, device=device)
    with pytest.raises(partialfc.PartialFCError, match="this communicator has been closed"):
        comm.barrier()


def test_any_order_of_freeing():
    def run(comm):
        head = make(comm=comm)
        head.step(*batch(), 0.1)

    on_ranks(run)
    gc.collect()


def test_a_forked_worker():
    """As torch's DataLoader has them: the child's copy of a head frees nothing, and a call of it is an error."""
    text = run_python(
        PROGRAM
        + """
head = make()
loss, _ = head.step(embeddings, labels, 0.0)
child = os.fork()
if child == 0:
    try:
        head.step(embeddings, labels, 0.0)
    except partialfc.PartialFCError as error:
        print(error, flush=True)
    import gc
    del head
    gc.collect()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert head.step(embeddings, labels, 0.0)[0] == loss
print("the parent goes on", flush=True)
"""
    )
    assert "PFC_ERROR_FORKED, rank 0" in text and "the parent goes on" in text


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "del comm", "head = None"])
def test_the_interpreter_ends_with_handles_alive(end):
    run_python(PROGRAM + f"comm = partialfc.Comm.self()\nhead = make(comm=comm)\nhead.step(embeddings, labels, 0.1)\n{end}\n")


def test_the_interpreter_ends_with_a_thread_in_a_step():
    run_python(
        PROGRAM
        + """
big = partialfc.Head(200_000, 64, 512, device=partialfc.Device.cpu(1))
rows = np.ones((512, 64), np.float32)
def steps():
    while True:
        big.step(rows, np.arange(512), 0.1)
threading.Thread(target=steps, daemon=True).start()
while not big._state.calls:
    time.sleep(0.001)
"""
    )


def test_a_head_in_use_is_not_closed():
    """A rank waits for another one inside its step."""
    comms = partialfc.Comm.threads(2)
    refused = []

    def run(comm):
        head = make(comm=comm)
        if comm.rank == 0:
            step = threading.Thread(target=lambda: head.step(*batch(), 0.1))
            step.start()
            while not head._state.calls:
                pass
            try:
                head.close()
            except partialfc.PartialFCError as error:
                refused.append(error)
            waiting.set()
            step.join()
        else:
            waiting.wait()
            head.step(*batch(), 0.1)

    waiting = threading.Event()
    assert on_ranks(run, comms=comms) == [None, None]
    assert "this head is in a call of another thread" in str(refused[0])


#: Sends SIGINT once `mine` waits.
KILL = """
def kill():
    while not mine._waiting:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=kill, daemon=True).start()
"""
WAITS = PROGRAM + "mine, other = partialfc.Comm.threads(2)\n" + KILL


def test_ctrl_c_inside_a_collective():
    text = run_python(
        WAITS
        + """
try:
    mine.barrier()  # Rank 1 never comes.
except KeyboardInterrupt:
    print("interrupted", flush=True)
try:
    mine.barrier()
except partialfc.PartialFCError as error:
    print(error)
"""
    )
    assert "interrupted" in text and "PFC_ERROR_ABORTED, rank 0" in text


def test_ctrl_c_ends_the_program():
    text = run_python(WAITS + "mine.barrier()\n", code=-2 if os.name == "posix" else 1)
    assert "KeyboardInterrupt" in text


def test_ctrl_c_in_a_call_that_goes_on_leaves_the_head_usable():
    """The other rank comes while the signal waits: the call ends by itself, and nothing is aborted."""
    text = run_python(
        WAITS
        + """
threading.Thread(target=lambda: (time.sleep(0.2), other.barrier(), other.barrier()), daemon=True).start()
try:
    mine.barrier()
except KeyboardInterrupt:
    print("interrupted", flush=True)
time.sleep(1.5)
mine.barrier()
print("goes on", flush=True)
"""
    )
    assert "interrupted" in text and "goes on" in text


def test_a_handler_of_the_programs_own_is_left_alone():
    text = run_python(
        PROGRAM
        + """
signal.signal(signal.SIGINT, lambda *_: print("handled", flush=True))
mine, other = partialfc.Comm.threads(2)
mine.set_timeout(3)
"""
        + KILL
        + """
try:
    mine.barrier()
except partialfc.PartialFCError as error:
    print(error, flush=True)
"""
    )
    assert "handled" in text and "PFC_ERROR_TIMEOUT" in text


def test_ctrl_c_inside_a_function_of_python():
    text = run_python(
        PROGRAM
        + """
def gather(send, recv):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
comm = partialfc.Comm.custom(0, 2, gather, gather)
try:
    make(comm=comm)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    )
    assert "interrupted" in text


def test_an_error_of_another_thread_does_not_show():
    """The library keeps an error's text for each thread."""
    heads = [make() for _ in range(4)]
    wrong = []

    def run(index):
        embeddings, labels = batch()
        labels[0] = -100 - index
        for _ in range(50):
            try:
                heads[index].step(embeddings, labels, 0.1)
            except partialfc.PartialFCError as error:
                if f"got {-100 - index} " not in str(error):
                    wrong.append(str(error))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_library_that_is_not_there():
    program = "import os\nos.environ['PFC_LIBRARY'] = '/nowhere/libpartialfc.so'\nimport partialfc\n"
    text = run_python(program, code=1)
    assert "ImportError: partialfc's library does not load" in text and "PFC_LIBRARY in the environment" in text


def test_errors_can_be_pickled(head):
    import pickle

    with pytest.raises(partialfc.PartialFCError) as caught:
        head.update(-1.0)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.status, again.rank) == (str(caught.value), caught.value.status, 0)


BEGINS = (
    PROGRAM
    + """
import tempfile
def gather(send, recv):
    recv[:] = send
def reduce(send, recv, op):
    recv[:] = send
def raising(number, frame):
    raise RuntimeError(f"signal {number}")
def where(name, number):
    def entered(frame, event, _):
        if event == "call" and frame.f_code.co_name == name and "partialfc" in frame.f_code.co_filename:
            sys.setprofile(None)
            signal.raise_signal(number)
    sys.setprofile(entered)
comm = partialfc.Comm.custom(0, 2, gather, reduce)
sent, received = np.arange(3), np.zeros((2, 3), np.int64)
"""
)
#: `mine` waits in its functions until it is aborted.
HANGS = (
    BEGINS
    + """
ended = threading.Event()
def wait(send, recv):
    ended.wait()
    raise RuntimeError("ended")
mine = partialfc.Comm.custom(0, 2, wait, reduce, abort=ended.set)
"""
)


@pytest.mark.parametrize(
    "signal", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.skipif(os.name != "posix", reason="no such handlers"))]
)
def test_a_signal_where_a_function_of_the_callers_begins(signal):
    """ctypes ignores an exception there, and the library would take the operation for done."""
    text = run_python(
        BEGINS
        + f"""
handler = raising if {signal!r} != "SIGINT" else signal.default_int_handler
signal.signal(signal.{signal}, handler)
where("call", signal.{signal})
try:
    comm.all_gather(sent, received)
except (KeyboardInterrupt, RuntimeError) as error:
    print("raised", repr(error), flush=True)
assert (received == sent).all(), received
assert signal.getsignal(signal.{signal}) is handler
received[:] = 0
comm.all_gather(sent, received)
assert (received == sent).all(), received
print("goes on", flush=True)
"""
    )
    assert ("raised KeyboardInterrupt()" if signal == "SIGINT" else "raised RuntimeError('signal 15')") in text
    assert "goes on" in text and "ignored" not in text


def test_ctrl_c_where_a_report_of_progress_begins(tmp_path):
    text = run_python(
        BEGINS
        + """
head = make()
where("tell", signal.SIGINT)
try:
    head.save(sys.argv[1], progress=lambda done, total: None)
except KeyboardInterrupt:
    print("interrupted", flush=True)
head.load(sys.argv[1])
print("goes on", flush=True)
""",
        str(tmp_path / "kept"),
    )
    assert "interrupted" in text and "goes on" in text and "ignored" not in text


def test_ctrl_c_where_functions_of_the_callers_carry_the_messages():
    """The wait is ended by the function that the caller gives for it."""
    text = run_python(
        HANGS
        + KILL
        + """
try:
    mine.all_gather(sent, received)
except KeyboardInterrupt:
    print("interrupted", flush=True)
try:
    mine.all_gather(sent, received)
except partialfc.PartialFCError as error:
    print(error, flush=True)
"""
    )
    assert "interrupted" in text and "PFC_ERROR_ABORTED, rank 0" in text


@pytest.mark.parametrize("call", ["make(comm=mine, sample_rate='all')", "head.step(embeddings[:, :5], labels, 0.1)"])
def test_ctrl_c_ends_a_wait_also_where_the_arguments_were_wrong(call):
    """Wrong arguments still make the collective call, which waits for the other rank."""
    text = run_python(
        BEGINS
        + f"""
own, others = partialfc.Comm.threads(2)
ended, alone = threading.Event(), threading.Event()
def wait():
    if alone.is_set():
        ended.wait()
        raise RuntimeError("ended")
def gather(send, recv):
    wait()
    own.all_gather(send.view(np.int64), recv.view(np.int64))
def reduce(send, recv, op):
    wait()
    recv[:] = send
    own.all_reduce(recv, op)
mine = partialfc.Comm.custom(0, 2, gather, reduce, abort=ended.set)
# The other rank makes a head, and nothing else.
other = threading.Thread(target=lambda: make(comm=others), daemon=True)
other.start()
head = make(comm=mine)
alone.set()
{KILL}
try:
    {call}
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    )
    assert "interrupted" in text


@pytest.mark.skipif(os.name != "posix", reason="no such handlers")
def test_all_signals_of_one_call_are_handled_once_and_their_settings_stay():
    text = run_python(
        BEGINS
        + """
import faulthandler
seen = []
def note(number, frame):
    seen.append(number)
    if number == signal.SIGUSR1:
        raise RuntimeError("from a handler")
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, note)
# A system call goes on after SIGTERM: a read waits for what comes later.
signal.siginterrupt(signal.SIGTERM, False)
def gather(send, recv):
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        signal.raise_signal(number)
    assert not seen
    recv[:] = send
noisy = partialfc.Comm.custom(0, 2, gather, reduce)
try:
    noisy.all_gather(sent, received)
except RuntimeError as error:
    print("raised", error, flush=True)
assert sorted(seen) in ([signal.SIGUSR1, signal.SIGTERM], [signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM]), seen
assert signal.getsignal(signal.SIGUSR1) is note
count = len(seen)
comm.all_gather(sent, received)
assert len(seen) == count, "handled twice"

import ctypes
class Action(ctypes.Structure):
    _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ubyte * 128), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
def flags():
    action = Action()
    assert ctypes.CDLL(None).sigaction(signal.SIGTERM, None, ctypes.byref(action)) == 0
    return action.handler, action.flags & 0x10000000  # SA_RESTART of Linux
if sys.platform == "linux":
    assert flags()[1], "the flag was lost"
    faulthandler.register(signal.SIGTERM, chain=True, file=sys.stderr)
    before = flags()
    comm.all_gather(sent, received)
    assert flags() == before, "faulthandler was lost"
print("settings stay", flush=True)
"""
    )
    assert "raised from a handler" in text and "settings stay" in text


def test_ctrl_c_where_the_callers_function_for_abort_begins():
    text = run_python(
        HANGS
        + """
def operate():
    try:
        mine.all_gather(sent, received)
    except partialfc.PartialFCError as error:
        print(error, flush=True)
other = threading.Thread(target=operate)
other.start()
while not mine._state.calls:
    time.sleep(0.001)
time.sleep(0.1)
where("call", signal.SIGINT)
try:
    mine.abort()
except KeyboardInterrupt:
    print("interrupted", flush=True)
other.join(60)
assert not other.is_alive(), "the operation hangs"
"""
    )
    assert "interrupted" in text and "PFC_ERROR_ABORTED, rank 0" in text and "ignored" not in text
