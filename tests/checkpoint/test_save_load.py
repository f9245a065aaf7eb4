"""What is saved comes back bit for bit, on any number of ranks, with any layout."""

import numpy as np
import pytest
from mpi4py import MPI

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.checkpoint import load, save

pytestmark = pytest.mark.mpi

SPECS = [
    ("weight", (37, 401), "float32"),
    ("bias", (5,), "float32"),
    ("empty", (0, 3), "float32"),
    ("scale", (), "float64"),
    ("half", (7, 1001), "float16"),
    ("brain", (4097,), "bfloat16"),
]


def make_params(seed, specs=SPECS):
    generator = np.random.default_rng(seed)
    return [
        Parameter(generator.standard_normal(shape).astype(np.dtype(dtype)), name)
        for name, shape, dtype in specs
    ]


def build(comm, seed=0, specs=SPECS, bucket_nbytes=30_000, **settings):
    policy = ShardPolicy(bucket_nbytes=bucket_nbytes, timeout_s=20)
    return NAdam(make_params(seed, specs), comm=comm, policy=policy, **settings)


def train(opt, steps):
    """Steps whose gradients depend on the step alone, so that all worlds take the same."""
    for step in steps:
        generator = np.random.default_rng(step)
        opt.zero_grad()
        for param in params_of(opt):
            grad = generator.standard_normal(param.grad.shape)
            param.grad[...] = grad.astype(param.grad.dtype)
        opt.step()


def params_of(opt):
    return [param for group in opt.param_groups for param in group["params"]]


def content(opt):
    """Everything a checkpoint keeps, on rank 0 of the optimizer's ranks."""
    state = opt.gather_state_dict()
    params = {param.name: param.data.tobytes() for param in params_of(opt)}
    if state is None:
        return None
    entries = {
        (index, key): value.tobytes() if isinstance(value, np.ndarray) else value
        for index, entry in state["state"].items()
        for key, value in entry.items()
    }
    return params, entries, repr(state["param_groups"])


@pytest.fixture
def folder(comm, mpi_tmp_path):
    return mpi_tmp_path


def part_of(comm, num_ranks):
    """The first ``num_ranks`` ranks as a world of their own; None on the others."""
    part = comm.Split(0 if comm.rank < num_ranks else MPI.UNDEFINED)
    return None if part == MPI.COMM_NULL else part


@pytest.mark.parametrize("num_savers", [1, 2, 3, 4])
@pytest.mark.parametrize("num_loaders", [1, 2, 3, 4])
def test_any_number_of_ranks_loads_what_any_number_saved(comm, folder, num_savers, num_loaders):
    if max(num_savers, num_loaders) > comm.size:
        pytest.skip("needs more ranks")
    saved = None
    savers = part_of(comm, num_savers)
    if savers is not None:
        with build(savers, lr=0.05) as opt:
            train(opt, range(3))
            save(folder / "a", opt, extra={"per_rank": savers.rank})
            saved = content(opt)
        savers.Free()
    comm.Barrier()
    loaders = part_of(comm, num_loaders)
    if loaders is not None:
        with build(loaders, seed=9, bucket_nbytes=70_000) as opt:
            assert load(folder / "a", opt) == {"per_rank": list(range(num_savers))}
            assert content(opt) == saved
            assert opt.last_step.step == 3
            assert opt.param_groups[0]["lr"] == 0.05
        loaders.Free()
