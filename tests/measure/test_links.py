"""Links are measured between any two ranks and between all of them, by MPI and by TCP."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from shardopt.measure import links
from shardopt.measure.links import (
    LinkSpeed,
    Messages,
    Pair,
    TcpLink,
    measure_all_gather,
    measure_both_ways,
    measure_latency,
    measure_link,
    plan_messages,
    sent_nbytes,
)


def make_pair(comm, first, second):
    """This rank's view of a pair, or None where it is in neither place."""
    if comm.rank not in (first, second):
        return None
    leads = comm.rank == first
    return Pair(comm, second if leads else first, leads)


def test_messages_are_of_sensible_size_and_number():
    for rate in (1e3, 1e7, 1e9, 1e12):
        messages = plan_messages(rate, 0.5)
        assert 64 << 10 <= messages.nbytes <= 16 << 20
        assert messages.count >= 3
        assert messages.count == 3 or messages.nbytes * messages.count <= rate * 0.5


def test_the_better_of_two_measurements():
    one, other = LinkSpeed(1e-6, 1e9), LinkSpeed(2e-6, 2e9)
    assert one.better_of(other) == other.better_of(one) == LinkSpeed(1e-6, 2e9)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("measure", [measure_latency, measure_both_ways])
def test_both_ends_of_a_link_get_a_number(comm, measure):
    for first, second in ((0, 1), (comm.size - 1, 0)):
        pair = make_pair(comm, first, second)
        found = measure(pair, 0.02) if pair else None
        assert all(value > 0 for value in comm.allgather(found) if value is not None)


@pytest.mark.mpi(min_size=2)
def test_a_link_is_measured_while_others_are(comm):
    """Ranks 0 and 1, 2 and 3 ... at the same time; an odd one waits."""
    first = comm.rank // 2 * 2
    speed = None
    if first + 1 < comm.size:
        speed = measure_link(make_pair(comm, first, first + 1), 0.02)
    speeds = comm.allgather(speed)
    assert [found is None for found in speeds] == [
        comm.size % 2 == 1 and rank == comm.size - 1 for rank in range(comm.size)
    ]
    assert all(found.latency_s > 0 and found.nbytes_per_s > 0 for found in speeds if found)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_an_all_gather_of_few_and_many_messages(comm, count):
    assert measure_all_gather(comm, Messages(1000, count)) > 0


@pytest.mark.mpi(min_size=2)
def test_the_bytes_of_an_all_gather_are_counted(comm, monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(links, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert measure_all_gather(comm, Messages(1000, 6)) == 6 * 1000 / 2.0


@pytest.mark.mpi
@pytest.mark.parametrize("nbytes", [0, 1, (1 << 20) + 1])
def test_tcp_connections_carry_a_message_from_each_to_each(comm, nbytes):
    link = TcpLink(comm, nbytes)
    assert link.nbytes == nbytes * (comm.size - 1)
    for _ in range(2):
        link.transfer()
    comm.Barrier()
    link.close()


@pytest.mark.mpi(min_size=2)
def test_a_connection_that_is_closed_is_an_error(comm):
    link = TcpLink(comm, 10)
    if comm.rank == 0:
        link.close()
    else:
        with pytest.raises(ConnectionError, match="closed its TCP connection"):
            link._receive(link._peers[0])
        link.close()


def test_sent_bytes_leave_out_the_loopback(monkeypatch):
    text = (
        "Inter-|   Receive                            |  Transmit\n"
        " face |bytes packets errs drop fifo frame compressed multicast|bytes packets ...\n"
        "    lo:    5 1 0 0 0 0 0 0 70 1 0 0 0 0 0 0\n"
        "  eth0: 1000 9 0 0 0 0 0 0 200 9 0 0 0 0 0 0\n"
        "  eth1:    0 0 0 0 0 0 0 0  30 0 0 0 0 0 0 0\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert sent_nbytes() == 230
