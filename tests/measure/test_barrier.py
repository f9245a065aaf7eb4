"""Barriers are timed on any number of ranks."""

import pytest

from shardopt.measure.barrier import measure_barrier, time_barriers


@pytest.mark.mpi
def test_a_barrier_takes_time_unless_a_rank_is_alone(comm):
    found = comm.allgather(measure_barrier(comm, 0.01))
    assert [bool(barrier_s) for barrier_s in found] == [comm.size > 1] * comm.size


@pytest.mark.mpi
def test_every_repetition_is_a_barrier(comm):
    assert time_barriers(comm, 3) > 0


def test_repetitions_are_as_many_as_asked_for():
    class Counting:
        calls = 0

        def Barrier(self):
            self.calls += 1

    comm = Counting()
    time_barriers(comm, 5)
    assert comm.calls == 5
