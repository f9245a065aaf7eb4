"""An optimizer beside as many true replicas, for what users write to weights between steps."""

import functools
import hashlib

import numpy as np
import pytest
from mpi4py import MPI

from shardopt import NAdam, ShardPolicy
from shardopt.comm.node_memory import writes
from tests.support.oracle import Oracle, make_params

SHAPES = [(3,), (5,), (), (0, 4), (33, 131), (9000,)]
"""Of parameters of which some share a page, and one is of several buckets."""

DTYPES = ["float32", "float64", "bfloat16", "float16"]
_MAKE = {
    "userfaultfd": writes.UserfaultfdTracking,
    "pagemap": writes.PagemapTracking,
    "compare": writes.CompareTracking,
}


@functools.cache
def tracking(way):
    """One of each kind for the whole process."""
    return _MAKE[way]()


def if_it_works(way):
    """The parameter of a test, which is skipped where this way does not work."""
    reason = writes._OBSTACLES[way]()
    return pytest.param(way, marks=[pytest.mark.skip(reason=reason)] if reason else [])


@pytest.fixture(params=map(if_it_works, _MAKE))
def way(request, monkeypatch):
    """Have the optimizers of a test track writes in each of the ways."""
    monkeypatch.setattr("shardopt.store.memory.write_tracking", lambda: tracking(request.param))
    return request.param


def ways_to_share(num_ranks):
    """The ranks of a machine as one node, as nodes of two, and as one node each."""
    if num_ranks == 1:
        return [True]
    if num_ranks % 2 or num_ranks == 2:
        return [True, False]
    # Three ranks share one node, or none, as four do.
    return [2, *(pytest.param(share, marks=pytest.mark.thorough) for share in (True, False))]


@pytest.fixture(params=ways_to_share(MPI.COMM_WORLD.size))
def share(request):
    """Have ranks share a node in all ways that their number allows."""
    return request.param


def values_of(dtype="float32", shapes=SHAPES, seed=0):
    """Values that the dtype can hold, of each shape."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def exact_gradient(seed, param):
    """A gradient whose sums over ranks are exact, so that bits do not depend on their order."""
    return (np.random.default_rng(seed).integers(-64, 64, param.shape) / 16).astype(param.dtype)


class Replicas:
    """An optimizer over all ranks, and the model that each true replica would have.

    Args:
        comm: The ranks.
        share: See ``ShardPolicy.share_node``.
        values: The initial values.
        **settings: Of the optimizer.
    """

    def __init__(self, comm, share, values, *, check_finite=False, **settings):
        settings = {"lr": 0.05} | settings
        self.comm, self.params, self.oracle = comm, make_params(values), Oracle(values, **settings)
        policy = ShardPolicy(
            share_node=share, bucket_nbytes=20_000, timeout_s=20, check_finite=check_finite
        )
        self.opt = NAdam(self.params, comm=comm, policy=policy, **settings)
        self.num_steps = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.opt.__exit__(*error)

    def write(self, change):
        """Have ``change(array, index)`` write to each parameter: of this rank, and of a replica."""
        for index, param in enumerate(self.params):
            change(param.data, index)
        self.expect(change)

    def expect(self, change):
        """Write to the replica alone."""
        for index, param in enumerate(self.oracle.params):
            self.oracle.params[index] = new = np.array(param)  # of a scalar, too
            change(new, index)

    def follow(self, absent=()):
        """Have the masters of the replica follow what was written, as an update begins with it."""
        oracle = self.oracle
        for index, (param, master) in enumerate(zip(oracle.params, oracle.masters, strict=True)):
            if index not in absent:
                differ = param != master.astype(param.dtype)
                oracle.masters[index] = np.where(differ, param.astype(master.dtype), master)

    def step(self, absent=(), spoiled=False):
        """One step of both.

        Args:
            absent: Indices of parameters without a gradient.
            spoiled: Whether the last rank has NaN in a gradient, so that the step is skipped.
        """
        self.num_steps += 1
        self.opt.zero_grad(set_to_none=True)
        grads = [
            [
                None if index in absent else exact_gradient([self.num_steps, rank, index], param)
                for index, param in enumerate(self.oracle.params)
            ]
            for rank in range(self.comm.size)
        ]
        for param, grad in zip(self.params, grads[self.comm.rank], strict=True):
            param.grad = grad
        if spoiled and self.comm.rank == self.comm.size - 1:
            self.params[-1].grad[-1] = np.nan
        self.opt.step()
        assert self.opt.last_step.skipped == spoiled
        if not spoiled:
            self.follow(absent)
            self.oracle.step(grads)
        self.assert_same()

    def assert_same(self):
        """All ranks must hold what a replica does, bit for bit."""
        assert_equal_on_all_ranks(self.comm, [param.data for param in self.params])
        for param, expected in zip(self.params, self.oracle.params, strict=True):
            np.testing.assert_array_equal(param.data, expected, err_msg=param.name)

    @property
    def kept_nbytes(self):
        """Bytes that this rank keeps copies of from step to step."""
        return sum(view.kept_nbytes for _, view in self.opt.core.parts.memory.pieces)


def assert_equal_on_all_ranks(comm, arrays):
    """Every rank must read the same bytes."""
    mine = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert comm.allgather(mine) == [mine] * comm.size
