"""Models in JAX and lucid train on any nodes to the same bits; ranks of one machine play several.

NumPy's are in ``test_bits``, torch's in ``test_early``.
"""

import functools
import itertools

import numpy as np
import pytest

from shardopt import ShardPolicy
from shardopt.checkpoint import load, save
from tests.support.frameworks import require
from tests.support.nodes import ways_to_the_same_bits

pytestmark = [
    pytest.mark.mpi(min_size=2),
    # lucid's nn.Linear casts memory that it has not written yet.
    pytest.mark.filterwarnings("ignore:.* encountered in cast:RuntimeWarning"),
]

WIDTHS = (20, 300, 30)
POLICY = {"bucket_nbytes": 20_000, "timeout_s": 30}  # a layer is some two buckets


def draw(step, rank, *shape):
    return np.random.default_rng([step, rank]).standard_normal(shape).astype(np.float32)


def draw_weights(seed):
    return [draw(seed, 0, *shape) / 10 for shape in itertools.pairwise(WIDTHS)]


@functools.cache  # compiled once
def jax_gradient():
    import jax
    from jax import numpy as jnp

    def loss(params, x):
        return jnp.mean((jax.nn.relu(x @ params["hidden"]) @ params["out"] - 1) ** 2)

    return jax.jit(jax.grad(loss))


class JaxRun:
    """Two layers in JAX, and their optimizer; ranks see data of their own."""

    def __init__(self, comm, policy, seed):
        from shardopt.jax import NAdam

        hidden, out = draw_weights(seed)
        self.rank = comm.rank
        self.grad = jax_gradient()
        self.opt = NAdam({"hidden": hidden, "out": out}, lr=0.01, comm=comm, policy=policy)

    def train(self, steps):
        params = self.opt.params
        for step in steps:
            params = self.opt.step(self.grad(params, draw(step, self.rank, 4, WIDTHS[0])))

    def params(self):
        return {name: np.asarray(array) for name, array in self.opt.params.items()}


class LucidRun:
    """The same in lucid; without biases, whose gradients it sums in the wrong order."""

    def __init__(self, comm, policy, seed):
        import lucid
        from lucid import nn

        from shardopt.lucid import NAdam

        layers = [nn.Linear(*sizes, bias=False) for sizes in itertools.pairwise(WIDTHS)]
        for layer, weight in zip(layers, draw_weights(seed), strict=True):
            layer.weight.data = weight.T.copy()
        self.rank = comm.rank
        self.lucid, self.model = lucid, nn.Sequential(layers[0], nn.ReLU(), layers[1])
        self.opt = NAdam(self.model.parameters(), lr=0.01, comm=comm, policy=policy)

    def train(self, steps):
        for step in steps:
            self.opt.zero_grad()
            x = self.lucid.Tensor(draw(step, self.rank, 4, WIDTHS[0]))
            ((self.model(x) - 1) ** 2).mean().backward()
            self.opt.step()

    def params(self):
        return dict(enumerate(param.data for param in self.model.parameters()))


RUNS = {"jax": JaxRun, "lucid": LucidRun}


@pytest.fixture(params=RUNS)
def make(request, comm):
    """Make runs of one framework on ranks that share as told."""
    require(request.param)
    return lambda share, seed=0, stage=1: RUNS[request.param](
        comm, ShardPolicy(stage=stage, share_node=share, **POLICY), seed
    )


def bits(comm, run):
    """The bytes of all parameters, which must be the same on every rank."""
    mine = {name: array.tobytes() for name, array in run.params().items()}
    assert all(theirs == mine for theirs in comm.allgather(mine))
    return mine


def test_bits_depend_on_neither_nodes_nor_stage(comm, make):
    found = []
    for share, stage in itertools.product(ways_to_the_same_bits(comm), (1, 2)):
        run = make(share, stage=stage)
        with run.opt as opt:
            start = bits(comm, run)
            run.train(range(4))
            found.append(bits(comm, run))
            assert opt.last_step.step == 4
            assert all(start[name] != found[-1][name] for name in start)
            assert (comm.allreduce(opt.last_step.sent_nbytes) > 0) == (
                opt.core.topology.num_nodes > 1
            )
    assert all(each == found[0] for each in found)


def test_a_run_goes_on_on_other_nodes(comm, make, mpi_tmp_path):
    ways = ways_to_the_same_bits(comm)
    for saving, loading in zip(ways, ways[1:] + ways[:1], strict=True):
        run, resumed = make(saving, stage=2), make(loading, seed=9)
        with run.opt, resumed.opt:
            run.train(range(3))
            resumed.train(range(50, 52))
            save(mpi_tmp_path / f"saved-{saving}", run.opt)
            assert bits(comm, resumed) != bits(comm, run)
            load(mpi_tmp_path / f"saved-{saving}", resumed.opt)
            assert bits(comm, resumed) == bits(comm, run)
            for each in run, resumed:
                each.train(range(3, 5))
            assert bits(comm, resumed) == bits(comm, run)
            assert resumed.opt.last_step.step == 5
