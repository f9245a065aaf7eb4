"""Gradients and parameters that are inf or NaN: skipped on all ranks, or told by name."""

import contextlib
import warnings

import numpy as np
import pytest

from shardopt import NAdam, ShardPolicy
from shardopt.errors import NonFiniteWarning
from tests.support.errors import warned
from tests.support.oracle import Oracle, all_grads, assert_same, initial, make_params, write

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 1.0}, {"policy": ShardPolicy(check_finite=True)}]
)
def test_a_step_with_an_overflow_is_skipped_on_all_ranks(comm, poison, options):
    values = initial()
    params, oracle = make_params(values), Oracle(values)
    options = options | {"comm": comm}
    with NAdam(params, **options) as opt:
        for step in range(3):
            opt.zero_grad()
            grads = all_grads(step, comm)
            write(params, grads[comm.rank])
            if step == 1 and comm.rank == comm.size - 1:
                params[4].grad[2, 2] = poison
            told = warned(comm, NonFiniteWarning, match="step 2 was skipped on all ranks")
            with told if step == 1 else contextlib.nullcontext():
                opt.step()
            assert opt.last_step.skipped == (step == 1)
            if step != 1:
                oracle.step(grads, factor=opt.last_step.clip_factor)
            assert_same(params, oracle)
            assert opt.last_step.poisoned_param is None
        assert opt.state_dict()["state"][0]["step"] == 2


def test_poisoned_parameters_are_named(comm):
    params = make_params(initial())
    with NAdam(params, comm=comm) as opt:
        for step in range(1, 5):
            opt.zero_grad()
            write(params, all_grads(step, comm)[comm.rank])
            if step == 2 and comm.rank == comm.size - 1:
                params[8].grad[-1] = np.nan
                params[4].grad[5, 5] = np.inf
            if step == 2:
                with warned(comm, NonFiniteWarning, match="'p4' holds inf or NaN since step 2"):
                    opt.step()
            else:
                opt.step()
            poisoned = step >= 2
            assert opt.last_step.poisoned_param == ("p4" if poisoned else None)
            assert opt.last_step.poisoned_since == (2 if poisoned else None)
            assert not opt.last_step.skipped


def test_check_finite_off_clips_without_skipping(comm):
    params = make_params(initial())
    policy = ShardPolicy(check_finite=False)
    with NAdam(params, comm=comm, max_grad_norm=1.0, policy=policy) as opt:
        write(params, all_grads(0, comm)[comm.rank])
        params[0].grad[0, 0] = np.nan
        with warned(comm, NonFiniteWarning):
            opt.step()
        assert not opt.last_step.skipped
        assert opt.last_step.poisoned_param == "p0"


def test_a_warning_raised_as_an_error_leaves_the_ranks_in_step(comm):
    params = make_params(initial())
    with NAdam(params, comm=comm, max_grad_norm=1.0) as opt:
        params[0].grad[...] = np.nan
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(NonFiniteWarning):
                opt.step()
        opt.zero_grad()
        opt.step()
        assert (opt.last_step.step, opt.last_step.skipped) == (2, False)
