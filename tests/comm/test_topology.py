"""Nodes and lanes, however the launcher has numbered the ranks."""

import pytest

from shardopt.comm.failure import Abort
from shardopt.comm.topology import arrange, make_topology


@pytest.mark.mpi(min_size=4)
def test_in_a_lane_a_rank_is_its_node(comm):
    """As ``mpirun -host h1 ... : -host h2 ... : -host h1 ...`` numbers ranks."""
    outermost_first = min(comm.rank, comm.size - 1 - comm.rank)
    if comm.size % 2:
        pytest.skip("nodes of two ranks")
    topology = arrange(comm.Dup(), comm.Split(outermost_first))
    assert topology.node == outermost_first
    assert topology.lane_comm.rank == topology.node
    assert topology.lane_comm.allgather(comm.rank) == topology.lane_ranks
    assert topology.node_comm.allgather(comm.rank) == topology.node_ranks
    assert [topology.places[rank] for rank in topology.lane_ranks] == [
        (node, topology.node_rank) for node in range(topology.num_nodes)
    ]
    topology.free()


@pytest.mark.mpi(min_size=2)
def test_ranks_of_a_machine_that_cannot_share_memory_are_nodes_of_their_own(comm):
    """It takes one rank that cannot."""
    machines = []

    def can_share(machine):
        machines.append(machine.size)
        return machine.rank != machine.size - 1

    topology = make_topology(comm, True, 60, Abort(), can_share)
    assert machines == [comm.size]
    assert topology.num_nodes == comm.size
    topology.free()
    topology = make_topology(comm, True, 60, Abort(), lambda machine: True)
    assert topology.node_size == comm.size
    topology.free()
