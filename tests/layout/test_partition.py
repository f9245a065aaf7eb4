"""The layout: every element owned once, for any parameters on any number of ranks."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt.errors import PartitionError
from shardopt.layout.partition import ALIGNMENT_NUMEL, CHUNK_NUMEL, ParamSpec, plan_partition

shapes = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple),
    st.tuples(st.integers(0, 30_000)),
)
dtypes = st.sampled_from(["float32", "float64", "float16"])


@st.composite
def spec_lists(draw, first=0):
    members = draw(st.lists(st.tuples(shapes, dtypes, st.integers(0, 3)), max_size=12))
    return [
        ParamSpec(f"p{first + i}", shape, dtype, group)
        for i, (shape, dtype, group) in enumerate(members)
    ]


worlds = st.integers(1, 64).flatmap(
    lambda nodes: st.tuples(st.just(nodes), st.integers(1, 64 // nodes))
)
bucket_sizes = st.sampled_from([1, 16_384, 40_000, 1 << 17, 32 << 20])


def owners(partition):
    """Give (region, start, stop) of every shard with its owner."""
    for node in range(partition.num_nodes):
        for node_rank in range(partition.node_size):
            for region in range(len(partition.regions)):
                for shard in partition.shards(node, node_rank, region):
                    yield (region, shard.start, shard.stop), (node, node_rank), shard


@given(spec_lists(), worlds, bucket_sizes)
def test_every_element_has_one_owner(specs, world, bucket_nbytes):
    partition = plan_partition(specs, *world, bucket_nbytes)
    assert partition.world_size == world[0] * world[1]
    runs = sorted((start, stop) for (_, start, stop), _, shard in owners(partition) if shard)
    position = 0
    for start, stop in runs:
        assert start == position
        position = stop
    assert position == partition.numel


@given(spec_lists(), worlds, bucket_sizes)
def test_parameters_keep_apart_and_aligned(specs, world, bucket_nbytes):
    partition = plan_partition(specs, *world, bucket_nbytes)
    assert [param.spec for param in partition.params] == specs
    taken = sorted((param.start, param.stop) for param in partition.params if param.spec.numel)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken))
    for param in partition.params:
        region = partition.regions[param.region]
        assert param.start % ALIGNMENT_NUMEL == 0
        assert region.dtype == param.spec.dtype
        assert region.start <= param.start <= param.stop <= region.stop
    assert partition.param_numel == sum(stop - start for start, stop in taken)


@given(spec_lists(), bucket_sizes)
def test_the_index_space_does_not_depend_on_the_world(specs, bucket_nbytes):
    one, many = (plan_partition(specs, *world, bucket_nbytes) for world in [(1, 1), (5, 7)])
    assert one.params == many.params
    assert one.regions == many.regions
    assert one.buckets == many.buckets


@given(spec_lists(), worlds, bucket_sizes)
def test_cuts_fall_on_chunks_and_shards_differ_by_one(specs, world, bucket_nbytes):
    partition = plan_partition(specs, *world, bucket_nbytes)
    for bucket in partition.buckets:
        itemsize = np.dtype(partition.regions[bucket.region].dtype).itemsize
        assert (bucket.start % CHUNK_NUMEL, bucket.stop % CHUNK_NUMEL) == (0, 0)
        numel = bucket.stop - bucket.start
        assert 0 < numel <= max(CHUNK_NUMEL, bucket_nbytes // itemsize)
    for (_, start, stop), _, _ in owners(partition):
        assert start % CHUNK_NUMEL == stop % CHUNK_NUMEL == 0
    for node in range(partition.num_nodes):
        for region in range(len(partition.regions)):
            shards, local_stop = partition.node_shards(node, region), 0
            for shard in shards:
                assert shard.local_start == local_stop  # end to end
                local_stop = shard.local.stop
            assert local_stop == partition.node_numel(node, region)
            assert all(a.stop <= b.start for a, b in itertools.pairwise(shards))  # in flat order
    for bucket in partition.buckets:
        parts = [bucket.lane_part(i, partition.node_size) for i in range(partition.node_size)]
        chunks = [part.numel // CHUNK_NUMEL for part in parts]
        assert max(chunks) - min(chunks) <= 1


@given(spec_lists(), worlds, bucket_sizes, st.data())
def test_segments_cover_exactly_the_parameters_of_a_cohort(specs, world, bucket_nbytes, data):
    partition = plan_partition(specs, *world, bucket_nbytes)
    cohort_of = [data.draw(st.integers(-1, 2)) for _ in specs]
    covered: dict[int, int] = {}
    for _, _, shard in owners(partition):
        segments = partition.segments(shard, cohort_of)
        for before, after in itertools.pairwise(segments):
            assert before.stop <= after.start
            assert before.stop < after.start or before.cohort != after.cohort  # as few as can be
        for segment in segments:
            assert shard.start <= segment.start < segment.stop <= shard.stop
            for index, span in partition.params_in(shard.region, segment):
                assert cohort_of[index] == segment.cohort
                covered[index] = covered.get(index, 0) + span.numel
    expected = {i: s.numel for i, s in enumerate(specs) if s.numel and cohort_of[i] >= 0}
    assert covered == expected


@given(spec_lists(), spec_lists(first=100), worlds, bucket_sizes)
@settings(max_examples=50)
def test_extending_leaves_the_rest_in_place(specs, more, world, bucket_nbytes):
    before = plan_partition(specs, *world, bucket_nbytes)
    after = before.extend(more)
    assert after.params[: len(specs)] == before.params
    assert after.regions[: len(before.regions)] == before.regions
    assert after.buckets[: len(before.buckets)] == before.buckets
    assert [param.spec for param in after.params[len(specs) :]] == more


def test_names_must_be_unique():
    specs = [ParamSpec("w", (2,), "float32", 0), ParamSpec("w", (3,), "float32", 0)]
    with pytest.raises(PartitionError, match="unique; got 'w' for parameters 0 and 1"):
        plan_partition(specs, 1, 1, 1 << 20)


def test_more_ranks_than_elements():
    partition = plan_partition([ParamSpec("w", (3,), "float32", 0)], 8, 8, 1)
    shards = [shard for _, _, shard in owners(partition) if shard]
    assert [shard.numel for shard in shards] == [CHUNK_NUMEL]


def test_a_partition_for_thousands_of_nodes_takes_no_more_memory_than_that_for_one():
    """Nothing is kept for each node or rank; with the same bucket it has as many objects."""
    specs = [ParamSpec(f"p{i}", (1000 + i,), "bfloat16", 0) for i in range(10_000)]
    peaks = []
    for num_nodes in (1, 16, 4096):
        tracemalloc.start()
        partition = plan_partition(specs, num_nodes, 8, 4 << 20)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert partition.world_size == 8 * num_nodes
    assert max(peaks) < 1.05 * peaks[0] < 10_000 * 1000
