"""Memory that all ranks of a node address."""

import numpy as np
import pytest
from mpi4py import MPI

from shardopt.comm.shared_memory import SharedMemory, free_shared_nbytes, shortage
from shardopt.comm.topology import make_topology
from shardopt.errors import SharedMemoryError

pytestmark = pytest.mark.mpi


def test_all_ranks_see_one_memory(comm):
    shared = SharedMemory(comm, 100 * (comm.rank + 1))
    sizes = [100 * (rank + 1) for rank in range(comm.size)]
    assert shared.memory.nbytes == sum(sizes)
    assert shared.memory.ctypes.data % 4096 == 0
    start = sum(sizes[: comm.rank])
    shared.memory[start : start + sizes[comm.rank]] = comm.rank + 1
    shared.publish()
    comm.Barrier()
    shared.acquire()
    expected = np.repeat(np.arange(1, comm.size + 1), sizes)
    np.testing.assert_array_equal(shared.memory, expected)
    comm.Barrier()
    shared.free()


def test_views_outlive_the_mapping(comm):
    shared = SharedMemory(comm, 8)
    view = shared.memory[:4] if comm.rank == comm.size - 1 else None
    if comm.rank == 0:
        shared.memory[:] = 7
    comm.Barrier()
    shared.free()
    assert view is None or (view == 7).all()


def test_shortage_has_the_numbers_and_the_remedy():
    assert shortage(1) is None
    needed = free_shared_nbytes() + (1 << 40)
    error = shortage(needed)
    assert isinstance(error, SharedMemoryError)
    assert isinstance(error, MemoryError)
    assert f"{needed:,} bytes free" in str(error)
    assert "remount" in str(error)


@pytest.mark.parametrize("share_node", [True, False])
def test_topology_of_one_machine(comm, share_node):
    topology = make_topology(comm, share_node, 60)
    assert (topology.rank, topology.world_size) == (comm.rank, comm.size)
    if share_node:
        assert (topology.num_nodes, topology.node_size) == (1, comm.size)
        assert (topology.node, topology.node_rank) == (0, comm.rank)
    else:
        assert (topology.num_nodes, topology.node_size) == (comm.size, 1)
        assert (topology.node, topology.node_rank) == (comm.rank, 0)
    assert topology.places[comm.rank] == (topology.node, topology.node_rank)
    assert MPI.Comm.Compare(topology.comm, comm) == MPI.CONGRUENT
    topology.free()
