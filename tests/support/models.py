"""What tests of checkpoints share: a model of all dtypes, steps, and everything that is kept."""

import numpy as np
import pytest
from mpi4py import MPI

from shardopt import NAdam, Parameter, ShardPolicy

UP_TO_THREE_RANKS = pytest.mark.skipif(
    MPI.COMM_WORLD.size > 3, reason="a fourth rank would do what the third does, in more time"
)

SPECS = [
    ("weight", (37, 401), "float32"),
    ("bias", (5,), "float32"),
    ("empty", (0, 3), "float32"),
    ("scale", (), "float64"),
    ("half", (7, 1001), "float16"),
    ("brain", (4097,), "bfloat16"),
]


def make_params(seed=0, specs=SPECS):
    generator = np.random.default_rng(seed)
    return [
        Parameter(generator.standard_normal(shape).astype(np.dtype(dtype)), name)
        for name, shape, dtype in specs
    ]


def build(comm, seed=0, specs=SPECS, bucket_nbytes=30_000, **settings):
    """An optimizer in which no parameter but ``weight`` is larger than a bucket."""
    policy = ShardPolicy(bucket_nbytes=bucket_nbytes, timeout_s=20)
    return NAdam(make_params(seed, specs), comm=comm, policy=policy, **settings)


def params_of(opt):
    return [param for group in opt.param_groups for param in group["params"]]


def train(opt, steps):
    """Steps whose gradients depend on the step alone."""
    for step in steps:
        generator = np.random.default_rng(step)
        opt.zero_grad()
        for param in params_of(opt):
            grad = generator.standard_normal(param.grad.shape)
            param.grad[...] = grad.astype(param.grad.dtype)
        opt.step()


def content(opt):
    """Everything that a checkpoint keeps, on rank 0 of the optimizer's ranks; None elsewhere."""
    state = opt.gather_state_dict()
    if state is None:
        return None
    entries = {
        (index, key): value.tobytes() if isinstance(value, np.ndarray) else value
        for index, entry in state["state"].items()
        for key, value in entry.items()
    }
    params = {param.name: param.data.tobytes() for param in params_of(opt)}
    return params, entries, repr(state["param_groups"])
