"""Updated shards reach every node."""

import functools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.transport.all_gather import AllGather
from shardopt.transport.local import LocalTransport
from tests.support.in_process import Broken, Cluster, LaggingBackend

worlds = st.tuples(st.integers(2, 4), st.integers(1, 3))


def gathers(cluster):
    """An all-gather for each rank, and the function that updates a bucket and starts it."""
    return [
        (AllGather(rank.transport, rank.backend), functools.partial(update, rank, number + 1))
        for number, rank in enumerate(cluster.ranks)
    ]


def update(rank, number, gather, plan):
    """Have the parameters that a rank owns show its number, and send them."""
    shards = plan.parts(plan.buffers.params)

    def work():
        shards[rank.place.node][:] = number

    if isinstance(rank.backend, LaggingBackend):
        rank.backend.put(work)
    else:
        work()
    gather.start(plan, shards)


def owners(cluster):
    """The number of the owner of each element."""
    numbers = np.zeros(cluster.partition.numel)
    for number, rank in enumerate(cluster.ranks):
        for shard in rank.buffers[0].shards:
            numbers[shard.slice] = number + 1
    return numbers


@given(worlds, st.integers(1, 9 * CHUNK_NUMEL), st.integers(0, 1 << 30), st.booleans())
@settings(max_examples=40)
def test_every_node_has_all_shards(world, numel, seed, lags):
    cluster, order = Cluster(*world, [numel], seed=seed, lags=lags), random.Random(seed)
    running = list(zip(gathers(cluster), cluster.ranks, strict=True))
    left = {id(gather): list(rank.reduction.plans) for (gather, _), rank in running}
    for _ in range(100_000):
        (gather, start), _ = order.choice(running)
        if left[id(gather)] and gather.has_room():
            start(gather, left[id(gather)].pop(0))
        in_transit = [gather.advance() for (gather, _), _ in running]  # look at all
        if not any(left.values()) and not any(in_transit):
            break
    for rank in cluster.ranks:
        np.testing.assert_array_equal(rank.buffers[0].params, owners(cluster))


def test_it_takes_no_more_buckets_than_it_has_room_for():
    cluster = Cluster(2, 1, [9 * CHUNK_NUMEL])
    (gather, start), plans = gathers(cluster)[0], cluster.ranks[0].reduction.plans
    started = 0
    while gather.has_room():
        start(gather, plans[started])
        started += 1
    assert 1 < started < len(plans)
    assert gather.awaited == (plans[0].bucket, [1])


def test_a_broken_connection_is_raised_where_progress_is_made():
    cluster = Cluster(2, 1, [2 * CHUNK_NUMEL])
    gather, start = gathers(cluster)[0]
    start(gather, cluster.ranks[0].reduction.plans[0])
    cluster.networks[0].cut(1)
    with pytest.raises(Broken):
        gather.advance()


def test_on_one_node_there_is_nothing_to_send():
    cluster = Cluster(1, 2, [3 * CHUNK_NUMEL])
    gather = AllGather(LocalTransport(0), cluster.backend)
    for plan in cluster.ranks[0].reduction.plans:
        gather.start(plan, plan.parts(plan.buffers.params))
        assert gather.advance() == 0
    assert gather.awaited == (0, [])
