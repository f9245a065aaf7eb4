"""Updated shards reach every node."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.transport.all_gather import AllGather
from shardopt.transport.local import LocalTransport
from tests.support.in_process import Broken, Cluster

worlds = st.tuples(st.integers(2, 4), st.integers(1, 3))


def gathers(cluster):
    """An all-gather for each rank, whose parameters show their owner."""
    for number, rank in enumerate(cluster.ranks):
        for plan in rank.reduction.plans:
            plan.part(rank.buffers[0].params, rank.place.node)[:] = number + 1
    return [AllGather(rank.transport) for rank in cluster.ranks]


def start(gather, plan):
    """Send and receive the parameters of a bucket."""
    gather.start(plan, plan.buffers.params)


def owners(cluster):
    """The number of the owner of each element."""
    numbers = np.zeros(cluster.partition.numel)
    for number, rank in enumerate(cluster.ranks):
        for shard in rank.buffers[0].shards:
            numbers[shard.slice] = number + 1
    return numbers


@given(worlds, st.integers(1, 9 * CHUNK_NUMEL), st.integers(0, 1 << 30))
@settings(max_examples=30)
def test_every_node_has_all_shards(world, numel, seed):
    cluster, order = Cluster(*world, [numel], seed=seed), random.Random(seed)
    running = list(zip(gathers(cluster), cluster.ranks, strict=True))
    left = {id(gather): list(rank.reduction.plans) for gather, rank in running}
    for _ in range(100_000):
        gather, _ = order.choice(running)
        if left[id(gather)] and gather.has_room():
            start(gather, left[id(gather)].pop(0))
        if not any(left.values()) and all(gather.advance() == 0 for gather, _ in running):
            break
    for rank in cluster.ranks:
        np.testing.assert_array_equal(rank.buffers[0].params, owners(cluster))


def test_it_takes_no_more_buckets_than_it_has_room_for():
    cluster = Cluster(2, 1, [9 * CHUNK_NUMEL])
    gather, plans = gathers(cluster)[0], cluster.ranks[0].reduction.plans
    started = 0
    while gather.has_room():
        start(gather, plans[started])
        started += 1
    assert 1 < started < len(plans)
    assert gather.awaited == (plans[0].bucket, [1])


def test_a_broken_connection_is_raised_where_progress_is_made():
    cluster = Cluster(2, 1, [2 * CHUNK_NUMEL])
    gather = gathers(cluster)[0]
    start(gather, cluster.ranks[0].reduction.plans[0])
    cluster.networks[0].cut(1)
    with pytest.raises(Broken):
        gather.advance()


def test_on_one_node_there_is_nothing_to_send():
    cluster = Cluster(1, 2, [3 * CHUNK_NUMEL])
    gather = AllGather(LocalTransport(0))
    for plan in cluster.ranks[0].reduction.plans:
        start(gather, plan)
        assert gather.advance() == 0
    assert gather.awaited == (0, [])
