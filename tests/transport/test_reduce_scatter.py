"""Sums reach the owners of shards, whatever the network does to messages."""

import random
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt.layout.dtypes import compute_dtype
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.traffic import NUM_STAGING_BUFFERS, plan_traffic
from tests.support.in_process import Broken, Cluster
from tests.support.kernel_suite import tree_sum

MAX_LOOKS = 100_000

worlds = st.tuples(st.integers(2, 4), st.integers(1, 3))
sizes = st.lists(st.integers(0, 4 * CHUNK_NUMEL), min_size=1, max_size=4).filter(any)


def run_until_reduced(cluster, seed=0, ranks=None):
    """Let ranks make progress in a random order until all have what they wait for."""
    order, ranks = random.Random(seed), ranks or cluster.ranks
    for _ in range(MAX_LOOKS):
        rank = order.choice(ranks)
        rank.reduction.advance()
        if all(is_complete(each) for each in ranks):
            return
    raise AssertionError("no end")


def is_complete(rank):
    reduction = rank.reduction
    places = reduction.final_places()
    reduction.advance()
    return reduction.num_reduced > max(place for place, _ in places) and reduction.is_idle


def expected_averages(cluster, grads):
    """The average of all ranks: the sum over nodes of the sums over their ranks, both trees."""
    full, wire = compute_dtype(cluster.dtype), cluster.wire_dtype
    size = cluster.node_size
    nodes = [
        tree_sum([g.astype(full) for g in grads[n * size : (n + 1) * size]])
        for n in range(cluster.num_nodes)
    ]
    if wire is not None:
        nodes = [node.astype(np.float32).astype(wire).astype(full) for node in nodes]
    return tree_sum(nodes) * nodes[0].dtype.type(1 / cluster.partition.world_size)


def assert_averages(cluster, expected):
    for rank in cluster.ranks:
        (buffers,) = rank.buffers
        for plan in rank.reduction.plans:
            owned = buffers.sums_of(plan.shard)
            np.testing.assert_array_equal(owned, expected[buffers.local(plan.shard).slice])


@given(worlds, sizes, st.integers(0, 1 << 30), st.sampled_from([1, 40_000, 1 << 20]))
@settings(max_examples=40)
def test_owners_get_the_averages_over_all_ranks(world, numels, seed, bucket_nbytes):
    cluster = Cluster(*world, numels, seed=seed, bucket_nbytes=bucket_nbytes)
    expected = expected_averages(cluster, cluster.fill_grads(seed))
    run_until_reduced(cluster, seed)
    assert_averages(cluster, expected)
    square_sums = sum(rank.reduction.square_sums(-1) for rank in cluster.ranks)
    chunks = expected.astype(np.float64).reshape(-1, CHUNK_NUMEL)
    np.testing.assert_allclose(square_sums, (chunks**2).sum(1), rtol=1e-12)
    for rank in cluster.ranks:
        params_nbytes = sum(p.nbytes for p in published(rank))
        planned = plan_traffic(cluster.partition, rank.place.node, rank.place.node_rank)
        assert rank.transport.sent.nbytes + params_nbytes == planned.nbytes


def published(rank):
    """The shards that would be sent to each other node after the update."""
    params = [plan.parts(rank.buffers[0].params)[rank.place.node] for plan in rank.reduction.plans]
    return params * len(rank.transport.others)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("wire_dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("node_size", [1, 2])
def test_other_dtypes_and_wires(dtype, wire_dtype, node_size):
    cluster = Cluster(3, node_size, [9000, 5], dtype, wire_dtype)
    expected = expected_averages(cluster, cluster.fill_grads())
    run_until_reduced(cluster)
    assert_averages(cluster, expected)


@pytest.mark.parametrize("num_chunks", [1, 2, 7])
@pytest.mark.parametrize("node_size", [1, 2])
def test_pieces_are_sent_once_they_are_computed(num_chunks, node_size):
    cluster = Cluster(2, node_size, [num_chunks * CHUNK_NUMEL], bucket_nbytes=1 << 20, lags=True)
    expected = expected_averages(cluster, cluster.fill_grads())
    run_until_reduced(cluster)
    assert_averages(cluster, expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("node_size", [1, 2])
def test_memory_is_used_again_once_it_is_read(seed, node_size):
    numel = 4 * NUM_STAGING_BUFFERS * node_size * CHUNK_NUMEL
    cluster = Cluster(2, node_size, [numel], seed=seed, lags=True)
    expected = expected_averages(cluster, cluster.fill_grads(seed))
    run_until_reduced(cluster, seed)
    assert_averages(cluster, expected)
    square_sums = sum(rank.reduction.square_sums(-1) for rank in cluster.ranks)
    chunks = expected.astype(np.float64).reshape(-1, CHUNK_NUMEL)
    np.testing.assert_allclose(square_sums, (chunks**2).sum(1), rtol=1e-12)


def test_a_limit_starts_no_more_buckets():
    cluster = Cluster(2, 1, [8 * CHUNK_NUMEL])
    cluster.fill_grads()
    for limit in (0, 1, 3):
        for _ in range(50):
            for rank in cluster.ranks:
                assert rank.reduction.advance(limit) <= limit
                assert rank.reduction.num_started == limit
    assert {rank.reduction.num_reduced for rank in cluster.ranks} == {3}


def test_a_late_node_holds_up_only_its_own_part():
    cluster = Cluster(3, 1, [60 * CHUNK_NUMEL], bucket_nbytes=3 * 4 * CHUNK_NUMEL)
    expected = expected_averages(cluster, cluster.fill_grads())
    (network,) = cluster.networks
    network.hold(2, 0)
    for _ in range(200):
        for rank in cluster.ranks:
            rank.reduction.advance()
    waiting, free, late = (rank.reduction for rank in cluster.ranks)
    assert waiting.num_reduced == 0
    assert waiting.num_started == NUM_STAGING_BUFFERS  # nobody has memory for more
    assert waiting.awaited == (waiting.plans[0].bucket, [2])
    assert free.num_reduced >= NUM_STAGING_BUFFERS
    assert not late.is_quiet()
    network.release()
    run_until_reduced(cluster)
    assert_averages(cluster, expected)


def test_buckets_that_changed_are_sent_again_and_the_last_sum_holds():
    cluster = Cluster(2, 2, [6 * CHUNK_NUMEL])
    cluster.fill_grads(seed=1)
    changed = [0, 3]
    mask = sum(1 << index for index in changed)
    run_until_reduced(cluster)
    before = expected_averages(cluster, [rank.buffers[0].grads.copy() for rank in cluster.ranks])
    after = expected_averages(cluster, cluster.fill_grads(seed=2))
    for rank in cluster.ranks:
        rank.reduction.resend(mask)
        places = dict(
            map(reversed, ((p, plan.bucket) for p, plan in rank.reduction.final_places()))
        )
        plans = rank.reduction.plans
        assert [places[plans[index].bucket] for index in changed] == [len(plans), len(plans) + 1]
    run_until_reduced(cluster)
    for rank in cluster.ranks:
        (buffers,) = rank.buffers
        for index, plan in enumerate(rank.reduction.plans):
            expected = after if index in changed else before
            owned = buffers.sums_of(plan.shard)
            np.testing.assert_array_equal(owned, expected[buffers.local(plan.shard).slice])


def test_a_broken_connection_is_raised_where_progress_is_made():
    cluster = Cluster(3, 1, [12 * CHUNK_NUMEL], bucket_nbytes=3 * 4 * CHUNK_NUMEL)
    cluster.fill_grads()
    cluster.ranks[0].reduction.advance()
    cluster.networks[0].cut(1)
    with pytest.raises(Broken, match="node"):
        run_until_reduced(cluster, ranks=cluster.ranks[:1])


def test_a_reset_starts_over():
    cluster = Cluster(2, 1, [5 * CHUNK_NUMEL])
    for seed in range(3):
        expected = expected_averages(cluster, cluster.fill_grads(seed))
        run_until_reduced(cluster, seed)
        assert_averages(cluster, expected)
        for rank in cluster.ranks:
            rank.reduction.reset()
            assert (rank.reduction.num_started, rank.reduction.num_reduced) == (0, 0)


def test_ranks_in_threads_of_their_own():
    cluster = Cluster(3, 2, [12 * CHUNK_NUMEL], bucket_nbytes=100_000)
    expected = expected_averages(cluster, cluster.fill_grads())

    def run(rank):
        while not is_complete(rank):
            pass

    threads = [threading.Thread(target=run, args=[rank], daemon=True) for rank in cluster.ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert_averages(cluster, expected)


def test_buckets_without_gradients_take_no_message():
    cluster = Cluster(3, 2, [5 * CHUNK_NUMEL, 7 * CHUNK_NUMEL], trained=0b10)
    grads = cluster.fill_grads()
    first = cluster.partition.params[0]
    for rank in cluster.ranks:
        rank.buffers[0].grads[: first.stop] = 0
    for grad in grads:
        grad[: first.stop] = 0
    run_until_reduced(cluster)
    assert_averages(cluster, expected_averages(cluster, grads))
    for rank in cluster.ranks:
        active = [plan for plan in rank.reduction.plans if rank.reduction.is_active(plan)]
        assert len(active) == 7  # a chunk each
        messages = sum(
            bool(plan.node_shards[node]) for plan in active for node in rank.transport.others
        )
        assert rank.transport.sent.messages == messages


@pytest.mark.parametrize("seed", range(5))
def test_a_bucket_may_become_active_while_ranks_are_at_different_places(seed):
    cluster = Cluster(2, 2, [6 * CHUNK_NUMEL, 6 * CHUNK_NUMEL], seed=seed, trained=0b01)
    grads, order = cluster.fill_grads(), random.Random(seed)
    for _ in range(order.randrange(60)):
        order.choice(cluster.ranks).reduction.advance(order.randrange(12))
    for rank in cluster.ranks:
        changed = rank.reduction.activate(0b11)
        assert changed.bit_count() == 6
        assert not rank.reduction.activate(0b11)
        rank.reduction.resend(changed)
    run_until_reduced(cluster, seed)
    assert_averages(cluster, expected_averages(cluster, grads))
    for rank in cluster.ranks:
        rank.reduction.reset()
    run_until_reduced(cluster, seed)
    assert_averages(cluster, expected_averages(cluster, grads))
