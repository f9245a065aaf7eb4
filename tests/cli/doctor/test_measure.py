"""The measurements of a job, with ranks of one machine that stand in for nodes."""

from pathlib import Path

import pytest


def test_rounds_pair_all_neighbours_and_no_node_twice():
    from shardopt.cli.doctor.measure import plan_rounds

    assert plan_rounds(1) == []
    assert plan_rounds(2) == [[(0, 1)]]
    for count in range(3, 10):
        rounds = plan_rounds(count)
        assert len(rounds) == 2 + count % 2
        for pairs in rounds:
            assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)
        ring = [(node, (node + 1) % count) for node in range(count)]
        assert sorted(pair for pairs in rounds for pair in pairs) == ring


@pytest.mark.mpi
@pytest.mark.parametrize("max_nodes", [1, 2, 4])
def test_measurements_of_any_nodes(comm, max_nodes, tmp_path):
    """Ranks of one machine stand in for nodes, also of unequal size."""
    from shardopt.cli.doctor.job import describe_job
    from shardopt.cli.doctor.measure import measure, plan_rounds
    from shardopt.cli.doctor.watch import Watch
    from shardopt.comm.topology import Topology

    colors = [rank % max_nodes for rank in range(comm.size)]
    count = len(set(colors))
    places = [(color, colors[:rank].count(color)) for rank, color in enumerate(colors)]
    node_comm, lane_comm = comm.Split(colors[comm.rank]), comm.Split(places[comm.rank][1])
    hosts = ("host",) * comm.size
    topology = Topology(comm.Dup(), node_comm, lane_comm, tuple(places), hosts)
    watch = Watch(60.0, comm.rank)
    ranks, nodes = describe_job(topology, watch)
    speeds = measure(topology, watch, budget_s=0.2, folder=Path(comm.bcast(str(tmp_path))))
    topology.free()
    if comm.rank:
        assert (ranks, nodes, speeds) == ((), (), None)
        return
    assert [rank.node for rank in ranks] == colors
    assert [node.ranks for node in nodes] == [
        tuple(rank for rank in range(comm.size) if colors[rank] == color) for color in range(count)
    ]
    assert not any(node.sharing_problem for node in nodes)
    pairs = sorted(pair for pairs in plan_rounds(count) for pair in pairs)
    assert [link.nodes for link in speeds.links] == pairs
    more = [rates for rates in (speeds.exchange, speeds.message_s) if rates]
    assert len(more) == (2 if count > 1 else 0)
    for rates in (speeds.memory, speeds.updates, speeds.disk, *more):
        assert len(rates) == count
        assert min(rates) > 0
    assert all(link.latency_s > 0 and link.nbytes_per_s > 0 for link in speeds.links)
    assert [bool(barrier) for barrier in speeds.barrier_s] == [len(n.ranks) > 1 for n in nodes]
