"""Integers of each rank that the others of its node can read."""

import itertools

import numpy as np
import pytest

from shardopt.comm.flags import NodeFlags
from shardopt.comm.node_memory.arena import Arena

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("num_fields", [1, 3, 8, 9])
def test_every_rank_sees_the_fields_of_all(comm, num_fields):
    flags = NodeFlags(Arena(comm), num_fields)
    assert flags.all.shape == (comm.size, num_fields)
    assert not flags.all.any()
    comm.Barrier()
    flags.mine[:] = 100 * comm.rank + np.arange(num_fields)
    flags.publish()
    comm.Barrier()
    flags.acquire()
    expected = 100 * np.arange(comm.size)[:, None] + np.arange(num_fields)
    np.testing.assert_array_equal(flags.all, expected)
    comm.Barrier()


@pytest.mark.parametrize("num_fields", [1, 8, 9])
def test_no_two_ranks_share_a_cache_line(comm, num_fields):
    flags = NodeFlags(Arena(comm), num_fields)
    starts = [row.ctypes.data for row in flags.all]
    assert all(start % 64 == 0 for start in starts)
    assert all(b - a >= 8 * num_fields for a, b in itertools.pairwise(starts))


def test_a_flag_orders_what_was_published_before_it(comm):
    """Each rank waits for the next one's flag and then finds its data, without a collective."""
    arena = Arena(comm)
    flags, data = NodeFlags(arena, 1), NodeFlags(arena, 8)
    neighbour = (comm.rank + 1) % comm.size
    for number in range(1, 50):
        data.mine[:] = number
        data.publish()
        flags.mine[0] = number
        flags.publish()
        while flags.all[neighbour, 0] < number:
            flags.acquire()
        data.acquire()
        assert (data.all[neighbour] >= number).all()
    comm.Barrier()
