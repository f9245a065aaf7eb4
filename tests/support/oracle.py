"""The optimizer without sharding, on every rank's gradients, in the dtype's own arithmetic.

Follows [Note: the bits of a sum] and [Note: one formula] literally, so that results
of any number of ranks, either MPI and any bucket size can be compared bit for bit.
"""

import numpy as np

from shardopt import Parameter
from shardopt.layout.dtypes import compute_dtype
from shardopt.rule.coefficients import StepCount
from shardopt.rule.nadam import NAdam
from tests.support.kernel_arrays import tree_sum

SHAPES = [(3, 4), (), (0, 5), (9000,), (33, 131), (1,), (4096,), (2, 3, 5), (20_001,)]


def initial(shapes=SHAPES, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def gradient(step, rank, index, shape, dtype="float32"):
    """A gradient that every rank can compute for any other."""
    rng = np.random.default_rng([step, rank, index])
    scale = 10.0 ** rng.integers(-3, 2)
    return np.asarray(rng.standard_normal(shape) * scale).astype(dtype)


class Oracle:
    """All parameters of one group; ``masters`` are float32 copies of those that have 16 bits."""

    def __init__(self, params, rule=NAdam, **hyper):
        self.params = [param.copy() for param in params]
        self.masters = [param.astype(compute_dtype(param.dtype.name)) for param in params]
        self.exp_avg = [np.zeros_like(master) for master in self.masters]
        self.exp_avg_sq = [np.zeros_like(master) for master in self.masters]
        self.step_counts = [StepCount() for _ in params]
        self.rule, self.hyper = rule, hyper

    def step(self, grads_by_rank, factor=1.0, **changed):
        """Step with grads_by_rank[rank][index]; None where a rank has no gradient."""
        self.hyper |= changed
        hyper, world_size = self.rule(**self.hyper), len(grads_by_rank)
        for index, p in enumerate(self.masters):
            grads = [grads[index] for grads in grads_by_rank]
            if all(grad is None for grad in grads):
                continue
            zeros = np.zeros_like(p)
            grads = [zeros if grad is None else grad.astype(p.dtype) for grad in grads]
            total = tree_sum(grads)
            self.step_counts[index] = hyper.after_step(self.step_counts[index])
            row = hyper.coefficients(self.step_counts[index], factor, 1 / world_size)
            c = np.array(row, p.dtype)
            g = c[0] * (c[11] * total) + c[1] * p
            m = c[3] * self.exp_avg[index] + c[4] * g
            v = c[5] * self.exp_avg_sq[index] + (c[6] * g) * g
            v_hat = v * c[9] if c[9] else c[9]
            p = p - (c[2] * p + (c[7] * g + c[8] * m) / (np.sqrt(v_hat) + c[10]))
            self.masters[index], self.exp_avg[index], self.exp_avg_sq[index] = p, m, v
            self.params[index] = p.astype(self.params[index].dtype)

    def norm(self, grads_by_rank):
        """Global norm of the averaged gradient, in float64."""
        totals = [
            tree_sum([grad.astype(compute_dtype(grad.dtype.name)) for grad in grads])
            for grads in zip(*grads_by_rank, strict=True)
        ]
        means = [total * total.dtype.type(1 / len(grads_by_rank)) for total in totals]
        squares = sum((mean.astype(np.float64) ** 2).sum() for mean in means)
        return float(np.sqrt(squares))


def make_params(values):
    return [Parameter(value.copy(), f"p{i}") for i, value in enumerate(values)]


def all_grads(step, comm, dtype="float32", shapes=SHAPES):
    return [
        [gradient(step, rank, index, shape, dtype) for index, shape in enumerate(shapes)]
        for rank in range(comm.size)
    ]


def write(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad[...] = grad


def assert_same(params, oracle):
    for param, expected in zip(params, oracle.params, strict=True):
        np.testing.assert_array_equal(param.data, expected, err_msg=param.name)
