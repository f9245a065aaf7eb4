"""The cost of messages, measured between any ranks."""

import pytest

from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.measure import messages


class Counting:
    """A lane that counts what is posted, and sends over MPI."""

    def __init__(self, comm):
        self.comm = comm
        self.others = [rank for rank in range(comm.size) if rank != comm.rank]
        self.sizes = []

    def post_send(self, array, node, tag):
        self.sizes.append(array.nbytes)
        return Request(self.comm.Isend(array, node, tag))

    def post_receive(self, array, node, tag):
        return Request(self.comm.Irecv(array, node, tag))


class Request:
    def __init__(self, request):
        self.is_done = request.Test


def test_the_smallest_message_is_a_chunk():
    assert messages.SMALLEST_NBYTES == CHUNK_NUMEL * 4


@pytest.mark.mpi(min_size=2)
def test_every_rank_finds_a_cost(comm):
    lane = Counting(comm)
    assert messages.measure_messages(lane, comm, 1e12, 0.02) > 0
    assert set(lane.sizes) == {0, messages.SMALLEST_NBYTES}
    assert len(set(comm.allgather(len(lane.sizes)))) == 1  # all have sent as many


@pytest.mark.mpi(min_size=2)
def test_the_time_of_bytes_is_no_cost(comm, monkeypatch):
    """Times that are made up: 3 s for each message, and 5 s more for its bytes."""

    def exchange(lane, comm, nbytes, count):
        return 7 + count * len(lane.others) * (8.0 if nbytes else 3.0)

    monkeypatch.setattr(messages, "_exchange", exchange)
    lane = Counting(comm)
    slow, fast = messages.SMALLEST_NBYTES / 5.0, 1e12
    assert messages.measure_messages(lane, comm, slow, 1.0) == pytest.approx(3.0)
    assert messages.measure_messages(lane, comm, fast, 1.0) == pytest.approx(8.0)
