"""The step as a whole, what it leaves behind when it fails, and what closing leaves."""

import gc
import traceback
import weakref

import numpy as np
import pytest

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.errors import RankMismatchError

pytestmark = pytest.mark.mpi


def make(comm, **settings):
    params = [Parameter(np.ones(5000, np.float32)), Parameter(np.ones(7, np.float64))]
    return params, NAdam(params, comm=comm, policy=ShardPolicy(timeout_s=30), **settings)


def take_step(params, opt):
    opt.zero_grad()
    for param in params:
        param.grad += 1
    opt.step()


def test_a_step_that_fails_is_not_counted(comm, monkeypatch):
    params, opt = make(comm)
    with opt:
        take_step(params, opt)
        with monkeypatch.context() as patch:
            patch.setattr(opt.core.parts.sync, "drain", lambda: 1 / 0)  # on every rank
            with pytest.raises(ZeroDivisionError):
                take_step(params, opt)
        assert [count.step for count in opt.core.step_counts] == [1, 1]
        assert opt.last_step.step == 1
        take_step(params, opt)
        assert [count.step for count in opt.core.step_counts] == [2, 2]
        assert opt.state_dict()["state"][0]["step"] == 2.0


def test_few_frames_lie_between_step_and_the_kernel(comm, monkeypatch):
    params, opt = make(comm)
    seen = []
    with opt:
        kernel = opt.core.parts.backend.kernel
        update = kernel.update

        def spy(*arguments):
            seen.append([frame.name for frame in traceback.extract_stack()])
            return update(*arguments)

        monkeypatch.setattr(kernel, "update", spy)
        take_step(params, opt)
    for names in seen:
        between = names[names.index("take_step") + 1 : -1]
        assert between == ["step", "step", "run", "_update"]  # of front end, core and step


@pytest.mark.parametrize("share_node", [True, False])
def test_closing_releases_the_state(comm, share_node):
    params = [Parameter(np.ones(50_000, np.float32))]
    opt = NAdam(params, comm=comm, policy=ShardPolicy(timeout_s=30, share_node=share_node))
    take_step(params, opt)
    (buffers,) = opt.core.parts.memory.buffers
    sums = {} if buffers.sums is None else buffers.sums.arrays
    arrays = [*opt.core.parts.memory.state.arrays(0).values(), *sums.values()]
    held = [weakref.ref(array.base) for array in arrays if array.base is not None]
    del buffers, sums, arrays
    opt.close()
    gc.collect()
    assert len(held) >= 2
    assert not any(ref() is not None for ref in held)
    assert (params[0].data < 1).all()  # the user's arrays stay


def test_sums_over_ranks_are_those_of_all_ranks(comm):
    _, opt = make(comm)
    with opt:
        sums = opt.sum_over_ranks([1, comm.rank, 0.5])
        ranks = range(comm.size)
        np.testing.assert_array_equal(sums, [comm.size, sum(ranks), comm.size / 2])
        assert sums.dtype == np.float64


def test_values_that_are_no_numbers_are_an_error_on_all_ranks(comm):
    _, opt = make(comm)
    with opt:
        values = ["one"] if comm.rank == comm.size - 1 else [1.0]
        with pytest.raises(ValueError, match="could not convert"):
            opt.sum_over_ranks(values)
        np.testing.assert_array_equal(opt.sum_over_ranks([1.0]), [comm.size])


@pytest.mark.mpi(min_size=2)
def test_different_numbers_of_values_are_a_mismatch(comm):
    _, opt = make(comm)
    with opt:
        with pytest.raises(RankMismatchError, match="shape of values"):
            opt.sum_over_ranks([1.0] * (1 + (comm.rank == 0)))
        np.testing.assert_array_equal(opt.sum_over_ranks([1.0]), [comm.size])
