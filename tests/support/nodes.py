"""Ways to cut the ranks of a run into nodes, and what is trained on them."""

import numpy as np

from shardopt import ShardPolicy
from shardopt.numpy import NAdam, Parameter

SHAPES = [(300, 70), (5,), (), (129, 257), (0, 3), (40_000,)]


def ways_to_share(comm):
    """One node, nodes of two ranks where the number is even, and a node for each rank."""
    return [True, 2, False] if comm.size % 2 == 0 else [True, False]


def ways_to_the_same_bits(comm):
    """Those of them that sum over ranks in the same order: all, for a power of two."""
    return ways_to_share(comm) if comm.size & (comm.size - 1) == 0 else [False]


def several_nodes(comm):
    """Those of them that have more than one node."""
    return [share for share in ways_to_share(comm) if share is not True and share < comm.size]


def make_params(dtype="float32", shapes=SHAPES):
    rng = np.random.default_rng(0)
    return [Parameter(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


def draw_grads(params, step, rank):
    rng = np.random.default_rng([step, rank])
    for param in params:
        param.grad = rng.standard_normal(param.data.shape).astype(param.data.dtype)


def train(comm, share, num_steps, *, dtype="float32", max_grad_norm=None, **policy):
    """Train on random gradients; give the bytes of parameters, last report, layout and place."""
    params = make_params(dtype)
    policy = ShardPolicy(share_node=share, timeout_s=30, **policy)
    with NAdam(params, lr=0.01, max_grad_norm=max_grad_norm, comm=comm, policy=policy) as opt:
        for step in range(num_steps):
            opt.zero_grad()
            draw_grads(params, step, comm.rank)
            opt.step()
        report, partition = opt.last_step, opt.partition
        place = opt.core.topology.places[comm.rank]
    return b"".join(param.data.tobytes() for param in params), report, partition, place
