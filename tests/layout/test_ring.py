"""The ring and the staging buffers of stage 2 stay small, whatever the job."""

import pytest

from shardopt.layout.footprint import plan_memory
from shardopt.layout.partition import CHUNK_NUMEL, ParamSpec, plan_partition
from shardopt.layout.ring import plan_ring, ring_bucket_nbytes
from shardopt.layout.traffic import MIB

NODES = pytest.mark.parametrize("nodes", [2, 4, 16, 64])
RANKS = pytest.mark.parametrize("ranks", [1, 2, 4, 8])


def plan(nodes, ranks, numel):
    spec = ParamSpec("p", (numel,), "float32", 0)
    return plan_partition([spec], nodes, ranks, ring_bucket_nbytes(nodes, ranks))


@NODES
@RANKS
@pytest.mark.parametrize("numel", [10_000_000, 1_000_000_000])
def test_memory_by_formula(nodes, ranks, numel):
    partition = plan(nodes, ranks, numel)
    ring = plan_ring(partition)
    report = plan_memory(partition, ring=ring)
    room_nbytes = max(64 * MIB, 0.05 * 4 * numel)
    staging_nbytes = report.travel_node_nbytes - 4 * partition.numel // nodes
    assert 0 < staging_nbytes <= room_nbytes
    two_of_each = 2 * ranks * ring.slot_nbytes
    most = max(16 * MIB, 0.05 * 4 * numel, two_of_each) + MIB
    assert report.ring_node_nbytes == ring.nbytes <= most
    assert report.grads_node_nbytes == 0
    by_node = plan_memory(partition, ring=ring, sums_by_node=True)
    assert by_node.node_nbytes - report.node_nbytes == by_node.grads_node_nbytes
    assert by_node.grads_node_nbytes == pytest.approx(4 * numel, rel=0.01)


@NODES
@RANKS
def test_every_rank_has_as_much_of_a_bucket(nodes, ranks):
    """Else a rank would own, and update, several times what others do."""
    partition = plan(nodes, ranks, 100_000_000)
    numel = partition.buckets[0].numel
    assert numel % (nodes * ranks * CHUNK_NUMEL) == 0
