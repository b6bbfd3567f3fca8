"""Communicators: threads, functions of Python, and what a failure of one rank does to the others."""

import gc
import threading

import numpy as np
import pytest

import partialfc
from conftest import batch, make, on_ranks


class Meeting:
    """Ranks that are threads, whose functions exchange what they send through a list."""

    def __init__(self, size: int):
        self.size = size
        self.sent = [None] * size
        self.barrier = threading.Barrier(size)

    def exchange(self, rank: int, array: np.ndarray) -> list:
        self.sent[rank] = array.copy()
        self.barrier.wait()
        sent = list(self.sent)
        self.barrier.wait()
        return sent

    def comm(self, rank: int, **more) -> partialfc.Comm:
        def all_gather(send, recv):
            recv[:] = np.stack(self.exchange(rank, send))

        def all_reduce(send, recv, op):
            recv[:] = {"sum": np.sum, "max": np.max}[op](np.stack(self.exchange(rank, send)), axis=0)

        functions = {"all_gather": all_gather, "all_reduce": all_reduce, "abort": self.barrier.abort, **more}
        return partialfc.Comm.custom(rank, self.size, **functions)


def test_collectives():
    def run(comm):
        total = np.array([comm.rank + 1, 10], np.int64)
        comm.all_reduce(total)
        largest = np.array([comm.rank], np.float32)
        comm.all_reduce(largest, "max")
        blocks = np.zeros((3, 2))
        comm.all_gather(np.full(2, comm.rank, np.float64), blocks)
        part = np.zeros(2, np.float32)
        comm.reduce_scatter(np.arange(6, dtype=np.float32), part)
        text = np.array([7 if comm.rank == 1 else 0], np.int32)
        comm.broadcast(text, root=1)
        comm.barrier()
        return total.tolist(), largest.tolist(), blocks[:, 0].tolist(), part.tolist(), text.tolist(), comm.traffic().barrier_calls

    for rank, told in enumerate(on_ranks(run, 3)):
        assert told == ([6, 30], [2], [0, 1, 2], [6 * rank, 6 * rank + 3], [7], 1)


def test_arguments_of_collectives():
    comm = partialfc.Comm.self()
    with pytest.raises(TypeError, match="array is float16 on rank 0; it must be float32"):
        comm.all_reduce(np.zeros(2, np.float16))
    with pytest.raises(ValueError, match="op is 'mean' on rank 0"):
        comm.all_reduce(np.zeros(2), "mean")
    with pytest.raises(ValueError, match="recv has 3 elements on rank 0; it must have 2"):
        comm.all_gather(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="array is not contiguous on rank 0"):
        comm.all_reduce(np.zeros((4, 4))[:, ::2])
    with pytest.raises(ValueError, match="count must be 0 to 4294967295, got -1"):
        partialfc.Comm.threads(-1)
    with pytest.raises(partialfc.PartialFCError, match="timeout must be above 0 ms, got 0"):
        comm.set_timeout(0)
    with pytest.raises(ValueError, match="unique_id has 3 bytes on rank 0; it must have 128"):
        partialfc.Comm.nccl(b"abc", 0, 2, partialfc.Device.cpu(1))


@pytest.mark.parametrize("placement", ["sharded", "replicated"])
def test_functions_of_python_carry_what_threads_carry(placement):
    def run(comm):
        with make(comm=comm, placement=placement, sample_rate=0.5) as head:
            losses = [head.step(*batch(rows=4 + comm.rank, seed=seed), 0.1)[0] for seed in range(3)]
            return losses, head.read_centers()

    meeting = Meeting(2)
    ours = on_ranks(run, comms=[meeting.comm(0), meeting.comm(1)])
    for (losses, centers), (expected_losses, expected_centers) in zip(ours, on_ranks(run)):
        assert losses == expected_losses
        np.testing.assert_array_equal(centers, expected_centers)


def test_functions_live_as_long_as_the_head_that_calls_them():
    meeting = Meeting(2)

    def run(comm):
        return make(comm=comm)

    # The communicators are nobody's but the heads'.
    heads = on_ranks(run, comms=[meeting.comm(0), meeting.comm(1)])
    gc.collect()
    comms = [head.comm for head in heads]
    del heads[:]
    gc.collect()
    assert on_ranks(lambda comm: comm.barrier(), comms=comms) == [None, None]


def test_a_function_that_raises():
    meeting = Meeting(2)
    spoiled = []

    def broken(send, recv, op):
        if spoiled:
            raise ConnectionError("the cable is out")
        recv[:] = {"sum": np.sum, "max": np.max}[op](np.stack(meeting.exchange(1, send)), axis=0)

    def run(comm):
        head = make(comm=comm)
        head.step(*batch(seed=comm.rank), 0.1)
        spoiled.append(comm.rank)
        head.step(*batch(seed=comm.rank), 0.1)

    comms = [meeting.comm(0), meeting.comm(1, all_reduce=broken)]
    for comm in comms:
        comm.set_timeout(20)
    other, raised = on_ranks(run, comms=comms)
    assert isinstance(raised, partialfc.PartialFCError) and raised.status_name == "PFC_ERROR_COMM" and raised.rank == 1
    assert isinstance(raised.__cause__, ConnectionError) and "cable" in str(raised.__cause__)
    assert isinstance(other, partialfc.PartialFCError)


def test_functions_that_are_none():
    with pytest.raises(TypeError, match="all_reduce is a int on rank 0; it must be a function"):
        partialfc.Comm.custom(0, 1, lambda send, recv: None, 3)


def test_a_wrong_argument_of_one_rank_reaches_the_others():
    def run(comm):
        with make(comm=comm) as head:
            embeddings, labels = batch()
            told = []
            calls = [
                lambda e, y: head.step(e, y, 0.1),
                head.forward,
                lambda e, y: head.prepare(y),
                lambda e, y: head.top_k(e if y.dtype == np.int64 else e[:, 1:], 2),
            ]
            for call in calls:
                try:
                    call(embeddings, labels if comm.rank == 0 else labels.astype(np.int16))
                    told.append(None)
                except Exception as error:
                    told.append(error)
            # Nothing was updated, and the heads remain usable.
            return told, head.step(embeddings, labels, 0.1)[0]

    (other, loss), (own, same_loss) = on_ranks(run)
    assert loss == same_loss
    assert [error.status_name for error in other] == ["PFC_ERROR_REMOTE"] * 4
    assert [type(error) for error in own] == [TypeError, TypeError, TypeError, ValueError]
    assert "labels is int16 on rank 1" in str(own[0])


def test_wrong_options_of_one_rank_reach_the_others():
    other, own = on_ranks(lambda comm: make(comm=comm, **({"placement": "here"} if comm.rank else {})))
    assert isinstance(own, ValueError)
    assert other.status_name == "PFC_ERROR_REMOTE"


def test_a_wrong_gradient_of_one_rank():
    def run(comm):
        with make(comm=comm) as head:
            embeddings, labels = batch()
            head.forward(embeddings, labels)
            error = None
            try:
                head.backward(None if comm.rank == 0 else np.zeros(3))
            except TypeError as caught:
                error = caught
            head.update(0.1)
            return error, head.step(embeddings, labels, 0.1)[0]

    (none, loss), (error, same_loss) = on_ranks(run)
    assert none is None and "gradient is float64 on rank 1" in str(error) and loss == same_loss


def test_the_timeout_is_not_the_programs_end():
    def run(comm):
        comm.set_timeout(0.2)
        if comm.rank == 0:
            comm.barrier()

    late, _ = on_ranks(run)
    assert late.status_name == "PFC_ERROR_TIMEOUT" and late.rank == 0


def test_abort_from_another_thread():
    comms = partialfc.Comm.threads(2)
    inside = threading.Event()

    def run(comm):
        if comm.rank == 1:
            inside.wait()
            return comm.abort()
        inside.set()
        return comm.barrier()

    ended, _ = on_ranks(run, comms=comms)
    assert ended.status_name == "PFC_ERROR_ABORTED"
