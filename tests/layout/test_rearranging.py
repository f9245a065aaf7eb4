"""Layouts of edited param groups: what stays does not move, and all invariants hold."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt.errors import PartitionError
from shardopt.layout.footprint import plan_memory
from shardopt.layout.partition import CHUNK_NUMEL, ParamSpec, plan_partition
from shardopt.layout.rearranging import rearrange
from shardopt.layout.span import Span
from tests.layout.test_partition import bucket_sizes, owners, spec_lists, worlds


@st.composite
def edits(draw, before, first):
    """Some of the parameters in another order, between new ones; and where each comes from."""
    kept = draw(st.permutations(range(len(before.params))))
    kept = kept[: draw(st.integers(0, len(kept)))]
    new = draw(spec_lists(first=first))
    sources = draw(st.permutations([*kept, *[None] * len(new)]))
    fresh = iter(new)
    specs = []
    for source in sources:
        spec = next(fresh) if source is None else before.params[source].spec
        specs.append(ParamSpec(spec.name, spec.shape, spec.dtype, draw(st.integers(0, 3))))
    return specs, sources


def parts_of_nodes(partition):
    """For each node and parameter its parts, and where they are in the node's state."""
    found = {}
    for node in range(partition.num_nodes):
        for region in range(len(partition.regions)):
            shards = partition.node_shards(node, region)
            for index, span, local in partition.owned_params(shards):
                found.setdefault((node, index), []).append((span, local))
    return found


def assert_is_a_partition(partition, specs):
    assert [param.spec for param in partition.params] == specs
    runs = sorted(span for _, _, span in owners(partition) if span)
    assert [run.start for run in runs] == [0, *(run.stop for run in runs)][: len(runs)]
    assert (runs[-1].stop if runs else 0) == partition.numel
    taken = sorted(Span(param.start, param.stop) for param in partition.params if param)
    assert all(one.stop <= other.start for one, other in itertools.pairwise(taken))
    for number, region in enumerate(partition.regions):
        members = [i for i, param in enumerate(partition.params) if param.region == number]
        assert sorted(region.param_indices) == members
        assert members
        starts = [partition.params[index].start for index in region.param_indices]
        assert starts == sorted(starts)
        buckets = [bucket for bucket in partition.buckets if bucket.region == number]
        assert [b.start for b in buckets] == [region.start, *(b.stop for b in buckets)][:-1]
        for index in members:
            assert partition.params[index].spec.dtype == region.dtype
            assert region.start <= partition.params[index].start
            assert partition.params[index].stop <= region.stop


def assert_finds_what_is_there(partition, data):
    """Look-ups must agree with a search through all parameters."""
    mask = data.draw(st.integers(0, (1 << len(partition.params)) - 1))
    chosen = [p for i, p in enumerate(partition.params) if mask >> i & 1 and p]
    overlapping = [
        number
        for number, bucket in enumerate(partition.buckets)
        if any(bucket.intersect(param) for param in chosen)
    ]
    assert partition.buckets_of(mask) == overlapping
    for number, region in enumerate(partition.regions):
        start = data.draw(st.integers(region.start, region.stop))
        span = Span(start, data.draw(st.integers(start, region.stop)))
        expected = {
            index: part
            for index, param in enumerate(partition.params)
            if param.region == number and (part := span.intersect(param))
        }
        assert dict(partition.params_in(number, span)) == expected
        covered = partition.runs(number, mask)
        members = [p for p in chosen if p.region == number]
        assert all(any(r.intersect(p) == Span(p.start, p.stop) for r in covered) for p in members)


@given(spec_lists(), spec_lists(first=100), worlds, bucket_sizes, st.data())
@settings(max_examples=60)
def test_what_stays_keeps_its_place_and_all_else_holds(specs, more, world, bucket_nbytes, data):
    before = plan_partition(specs, *world, bucket_nbytes).extend(more)
    for round_ in (2, 3):
        specs, sources = data.draw(edits(before, first=100 * round_))
        after = rearrange(before, specs, sources)
        assert_is_a_partition(after, specs)
        assert_finds_what_is_there(after, data)
        old, new = parts_of_nodes(before), parts_of_nodes(after)
        for index, source in enumerate(sources):
            for node in range(world[0]) if source is not None else ():
                assert new.get((node, index)) == old.get((node, source))
        stay = [source for source in sources if source is not None]
        for number, old_number in enumerate(before.regions_with(stay)):
            assert after.regions[number].numel == before.regions[old_number].numel
        before = after


@given(spec_lists(), worlds, bucket_sizes)
@settings(max_examples=30)
def test_an_edit_that_changes_nothing_does_not(specs, world, bucket_nbytes):
    before = plan_partition(specs, *world, bucket_nbytes)
    assert rearrange(before, specs, range(len(specs))) == before


def test_a_new_parameter_may_have_the_name_of_one_that_leaves():
    old = [ParamSpec("w", (2,), "float32", 0), ParamSpec("b", (3,), "float32", 0)]
    before = plan_partition(old, 1, 1, 1)
    new = [ParamSpec("w", (9000,), "float32", 0), old[1]]
    after = rearrange(before, new, [None, 1])
    assert [(param.spec, param.region) for param in after.params] == [(new[0], 1), (new[1], 0)]
    with pytest.raises(PartitionError, match="unique; got 'w' for"):
        rearrange(before, [*old, new[0]], [0, 1, None])


def test_what_has_left_needs_neither_gradients_nor_state():
    old = [ParamSpec(name, (CHUNK_NUMEL,), "float32", 0) for name in "abc"]
    before = plan_partition(old, 1, 2, 1)
    after = rearrange(before, [old[2]], [2])
    report = plan_memory(after)
    assert report.params_node_nbytes == 3 * 4 * CHUNK_NUMEL  # which users may have views of
    assert report.grads_node_nbytes == 2 * 4 * CHUNK_NUMEL
    assert report.moments_node_nbytes == 8 * CHUNK_NUMEL
