"""Traffic and staging buffers, against counting every shard; and what planning takes itself."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt.layout.footprint import plan_memory
from shardopt.layout.partition import ParamSpec, plan_partition
from shardopt.layout.traffic import (
    default_bucket_nbytes,
    lane_parts,
    partial_row_numel,
    plan_staging_buffer,
    plan_traffic,
    sends_grads,
)

SIZES = st.lists(
    st.tuples(st.integers(0, 60_000), st.sampled_from(["float32", "bfloat16", "float64"])),
    max_size=6,
)


@given(
    SIZES,
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(1, 300_000),
    st.sampled_from([None, "bfloat16"]),
)
@settings(max_examples=60)
def test_sums_are_those_of_every_shard(sizes, num_nodes, node_size, bucket_nbytes, wire_dtype):
    specs = [ParamSpec(f"p{i}", (numel,), dtype, 0) for i, (numel, dtype) in enumerate(sizes)]
    partition = plan_partition(specs, num_nodes, node_size, bucket_nbytes)
    for node in range(num_nodes):
        for lane in range(node_size):
            nbytes = messages = send = receive = 0
            for part in lane_parts(partition, lane, wire_dtype):
                wire, item = (np.dtype(d).itemsize for d in (part.wire_dtype, part.dtype))
                own = part.shards[node]
                assert own == part.shard(node)
                assert part.num_shards == sum(map(bool, part.shards))
                for other, shard in enumerate(part.shards):
                    if other != node:
                        nbytes += shard.numel * wire + own.numel * item
                        messages += bool(shard) + bool(own)
                if not sends_grads(part.dtype, node_size, part.wire_dtype):
                    send = max(send, sum(shard.numel for shard in part.shards) * wire)
                receive = max(receive, num_nodes * partial_row_numel(own.numel, wire) * wire)
            assert plan_traffic(partition, node, lane, wire_dtype) == (nbytes, messages)
            assert plan_staging_buffer(partition, node, lane, wire_dtype) == (send, receive)


def peak_nbytes(num_nodes, bucket_nbytes):
    """The most memory that planning a large model takes, the partition itself left out."""
    specs = [ParamSpec(f"p{i}", (700_000,), "bfloat16", 0) for i in range(2_000)]
    partition = plan_partition(specs, num_nodes, 8, bucket_nbytes)
    tracemalloc.start()
    try:
        plan_memory(partition)
        plan_traffic(partition, num_nodes - 1, 7)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_planning_takes_no_memory_that_grows_with_the_world():
    peak_nbytes(2, 4 << 20)  # caches are filled
    small, large = (peak_nbytes(num_nodes, 4 << 20) for num_nodes in (2, 4096))
    assert large < 1.1 * small + 4096


@pytest.mark.parametrize("num_nodes", [512, 4096])
def test_planning_looks_at_a_bucket_of_each_size_only(num_nodes, monkeypatch):
    specs = [ParamSpec(f"p{i}", (700_000,), "bfloat16", 0) for i in range(2_000)]
    partition = plan_partition(specs, num_nodes, 8, 4 << 20)
    assert len(partition.buckets) > 600
    cuts = []
    cut = type(partition.buckets[0]).cut
    for kind in (type(partition.buckets[0]), type(partition.buckets[0].lane_part(0, 8))):
        monkeypatch.setattr(kind, "cut", lambda *args: cuts.append(args) or cut(*args))
    plan_memory(partition)
    plan_traffic(partition, num_nodes - 1, 7)
    assert len(cuts) <= 4 * 2 * 8  # buckets are of two sizes


def test_default_buckets_have_a_message_for_every_rank():
    assert default_bucket_nbytes(1, 8) == 32 << 20
    assert default_bucket_nbytes(4096, 4096 * 8) == 2 << 30
