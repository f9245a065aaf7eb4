"""Averages on a backend that computes late."""

import numpy as np

from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.transport.averaging import AveragedGrads
from tests.support.in_process import Cluster


def test_squares_are_those_of_the_parameters_that_are_asked_for():
    cluster = Cluster(1, 2, [CHUNK_NUMEL] * 4, bucket_nbytes=1 << 20, lags=True)
    (first, second), rank = cluster.fill_grads(), cluster.ranks[0]
    (plan,) = [plan for plan in rank.reduction.plans if plan.shard.start == 0]
    averages = AveragedGrads(rank.backend, 0, 0)
    averages.extend(cluster.partition)
    averages.write(plan, Span(0, plan.shard.numel), plan.grads, 0b1111, 0.5)
    square_sums = averages.square_sums([plan], 0b001)
    average = (first + second)[:CHUNK_NUMEL] / 2
    expected = (average.astype(np.float64) ** 2).sum()
    np.testing.assert_allclose(square_sums, [expected, 0, 0, 0], rtol=1e-6)
