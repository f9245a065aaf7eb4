"""Settings that are changed on the way hold from the next step on, and other assignments raise."""

import numpy as np
import pytest

from shardopt.errors import HyperparamsError, RankMismatchError
from shardopt.numpy import NAdam, Parameter
from shardopt.policy import ShardPolicy
from tests.support.errors import (
    differing,
    everything,
    is_last,
    make_optimizer,
    make_params,
    refused,
    take_step,
)

pytestmark = pytest.mark.mpi


# -- max_grad_norm ---------------------------------------------------------------------------------


def test_a_norm_that_is_set_holds_from_the_next_step_on(comm):
    with make_optimizer(comm) as opt:
        for norm in (None, 0.5, np.float32(0.25), 1e9, None, 0.125):
            opt.max_grad_norm = norm
            assert opt.max_grad_norm == norm
            take_step(opt)
            report = opt.last_step
            assert (report.grad_norm is None) == (norm is None)
            expected = 1.0 if norm is None else min(1.0, norm / (np.sqrt(12) + 1e-6))
            assert report.clip_factor == pytest.approx(expected, rel=1e-6)


def test_a_norm_that_is_set_gives_the_bits_of_one_that_was_so_from_the_start(comm):
    kept = []
    for settings in ({}, {"max_grad_norm": 0.5}, {"max_grad_norm": 0.1}):
        with make_optimizer(comm, **settings) as opt:
            opt.max_grad_norm = 0.5
            for _ in range(2):
                take_step(opt)
            kept.append(everything(opt))
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("usual", [None, 1.0])
def test_a_different_norm_on_one_rank_is_refused_at_the_next_step(comm, usual):
    with make_optimizer(comm) as opt:
        opt.max_grad_norm = 2.0 if is_last(comm) else usual
        before = everything(opt)
        for _ in range(2):
            with refused(
                comm, RankMismatchError, differing(comm, "max_grad_norm", repr(usual), "2.0")
            ):
                opt.step()
        assert everything(opt) == before
        opt.max_grad_norm = 2.0
        take_step(opt)


def test_groups_are_added_after_a_norm_was_set(comm):
    with make_optimizer(comm, max_grad_norm=1.0) as opt:
        opt.max_grad_norm = 0.5
        opt.add_param_group({"params": [Parameter(np.ones(3), "late")]})
        take_step(opt)
        assert opt.last_step.clip_factor < 0.5


@pytest.mark.parametrize(
    ("norm", "told"),
    [
        (0.0, "must be > 0 or None; got 0.0"),
        (float("nan"), "must be > 0 or None; got nan"),
        ("1", "must be a real number; got '1'"),
        (True, None),
    ],
)
def test_a_wrong_norm_is_refused_when_it_is_set(comm, norm, told):
    with make_optimizer(comm, max_grad_norm=3.0) as opt:
        if told is None:
            opt.max_grad_norm = norm
            assert type(opt.max_grad_norm) is float
            return
        with refused(comm, HyperparamsError, f"max_grad_norm {told}"):
            opt.max_grad_norm = norm
        assert opt.max_grad_norm == 3.0


# -- defaults --------------------------------------------------------------------------------------


def test_defaults_hold_for_groups_added_later(comm):
    first, *others = make_params()
    with make_optimizer(comm, [first], lr=0.5) as opt:
        opt.defaults["lr"] = 0.25
        opt.add_param_group({"params": [others[0]]})
        mine = {**opt.defaults, "lr": 0.125}
        opt.defaults = mine
        assert opt.defaults is mine
        mine["eps"] = 1e-3
        opt.add_param_group({"params": [others[1]]})
        assert [group["lr"] for group in opt.param_groups] == [0.5, 0.25, 0.125]
        assert [group["eps"] for group in opt.param_groups] == [1e-8, 1e-8, 1e-3]


def test_defaults_that_lack_something_are_refused_by_name(comm):
    first, second, _ = make_params()
    with make_optimizer(comm, [first]) as opt:
        with refused(comm, HyperparamsError, "defaults must be a dict; got 0.1"):
            opt.defaults = 0.1
        opt.defaults = {"lr": 0.1}
        with refused(comm, HyperparamsError, "a param group must have betas; got none"):
            opt.add_param_group({"params": [second]})
        take_step(opt)


# -- the policy ------------------------------------------------------------------------------------


def test_a_deadline_may_differ_between_ranks_and_be_set(comm):
    policy = ShardPolicy(timeout_s=20 + comm.rank)
    with NAdam(make_params(), comm=comm, policy=policy) as opt:
        assert opt.policy is policy
        opt.policy.timeout_s = 40.0 + comm.rank
        opt.add_param_group({"params": [Parameter(np.ones(3), "late")]})
        take_step(opt)


def test_other_settings_of_the_policy_stay(comm):
    with make_optimizer(comm) as opt:
        with pytest.raises(AttributeError, match=r"policy.overlap must stay .* Build a new opt"):
            opt.policy.overlap = False
        assert opt.policy.overlap


# -- everything else -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lr", r"Write for group in opt.param_groups: group\['lr'\] = 0.5\."),
        ("variant", r"group\['variant'\] = 0.5"),
        ("comm", "Build a new optimizer"),
        ("policy", "Set opt.policy.timeout_s; for other settings: build"),
        ("timeout_s", "Set opt.policy.timeout_s"),
        ("last_step", "It is the report of the last step"),
        ("partition", r"call add_param_group\(\)"),
        ("params", r"call load_params\(\) or add_param_group\(\)"),
        ("core", "Leave it alone"),
        ("max_gradnorm", r"Did you mean max_grad_norm\? There are defaults, max_grad_norm"),
        ("learnrate", "There are defaults"),
    ],
)
def test_other_assignments_raise(opt, name, told):
    with pytest.raises(AttributeError, match=f"{name} of an optimizer must not be .* {told}"):
        setattr(opt, name, 0.5)


def test_methods_may_be_replaced_and_subclasses_may_have_attributes(comm):
    class Counting(NAdam):
        num_calls = 0

    with Counting(make_params(), comm=comm) as opt:
        step = opt.step

        def counted():
            opt.num_calls += 1
            step()

        opt.step = counted
        opt._note = "one's own"
        take_step(opt)
        assert opt.num_calls == 1
        assert opt.last_step.step == 1
