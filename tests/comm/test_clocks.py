"""Clocks of ranks are compared: the true distance lies within the error that is reported."""

import time

import pytest

from shardopt.comm.clocks import ClockOffset, compare_clocks, name_clock
from shardopt.comm.consensus import make_consensus
from shardopt.comm.failure import Abort
from shardopt.policy import ShardPolicy

pytestmark = pytest.mark.mpi

HOUR_NS = 3_600_000_000_000


@pytest.fixture
def collectives(comm):
    consensus = make_consensus(comm, ShardPolicy(timeout_s=30), Abort())
    yield consensus.collectives
    consensus.free()


def test_the_true_distance_lies_within_the_error(comm, collectives):
    ahead_ns = comm.rank * HOUR_NS + comm.rank * 12_345_678

    def now():
        return time.perf_counter_ns() + ahead_ns

    clocks = [f"clock {rank}" for rank in range(comm.size)]
    found = compare_clocks(collectives, clocks, 0, "test", now)
    assert abs(found.offset_ns + ahead_ns) <= found.error_ns
    assert (found.error_ns == 0) == (comm.rank == 0)
    assert abs(found.at_ns - now()) < HOUR_NS


def test_ranks_of_one_clock_share_a_measurement(comm, collectives):
    clocks = ["first"] + ["second"] * (comm.size - 1)
    found = compare_clocks(collectives, clocks, 0, "test")
    assert len(set(comm.allgather(found)[1:])) <= 1


def test_ranks_of_one_machine_have_one_clock(comm, collectives):
    clocks = comm.allgather(name_clock())
    assert len(set(clocks)) == 1
    found = compare_clocks(collectives, clocks, 0, "test")
    assert found == ClockOffset(found.at_ns, 0, 0)
