"""A state dict that does not fit is refused on all ranks, and nothing has changed then."""

import copy
import warnings

import numpy as np
import pytest

from shardopt.errors import CheckpointError, PartialStateWarning, RankMismatchError
from shardopt.numpy import Parameter
from shardopt.policy import ShardPolicy
from tests.support.errors import (
    BOTH_WAYS,
    assert_steps,
    differing,
    errs,
    everything,
    is_last,
    make_optimizer,
    make_params,
    refused,
    take_step,
)

pytestmark = pytest.mark.mpi


@pytest.fixture
def whole(comm, opt):
    """Its state, on every rank; it has stepped once more since."""
    state = comm.bcast(opt.gather_state_dict())
    take_step(opt, 3.0)
    return state


@pytest.fixture
def nodes_opt(comm):
    """An optimizer on nodes of one rank each, that must still step after the test."""
    policy = ShardPolicy(timeout_s=20, share_node=False)
    with make_optimizer(comm, policy=policy) as opt:
        take_step(opt)
        yield opt
        assert_steps(opt)


def state_dict_of(opt):
    """A copy of its state dict, without the warning that it is a part."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PartialStateWarning)
        return copy.deepcopy(opt.state_dict())


@pytest.fixture
def part(nodes_opt):
    """This node's part of its state; it has stepped once more since."""
    state = state_dict_of(nodes_opt)
    take_step(nodes_opt, 3.0)
    return state


def remove(*path):
    """Take out what is at the end of a path of keys."""

    def edit(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return edit


def put(value, *path):
    """Put a value at the end of a path of keys."""

    def edit(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return edit


WRONG = {
    "no state": (remove("state"), "state_dict must have the key 'state'"),
    "no groups": (remove("param_groups"), "state_dict must have the key 'param_groups'"),
    "state is no dict": (put(5, "state"), "state_dict must have the form"),
    "groups are no list": (put(None, "param_groups"), "state_dict must have the form"),
    "entry is no dict": (put(None, "state", 1), "state_dict must have the form"),
    "surplus parameter": (
        put({}, "state", 7),
        "state must have entries for the params of its param_groups only; got [7].",
    ),
    "missing moment": (remove("state", 1, "exp_avg"), "state of 'b' must have the keys exp_avg,"),
    "missing step": (remove("state", 1, "step"), "state of 'b' must have the keys exp_avg,"),
    "surplus moment": (
        put(np.zeros(5), "state", 1, "max_exp_avg_sq"),
        "state of 'b' must have the keys exp_avg,",
    ),
    "shape": (
        put(np.zeros(4, np.float32), "state", 1, "exp_avg"),
        "exp_avg of 'b' must have shape (5,); got (4,).",
    ),
    "transposed": (
        put(np.zeros((3, 2), np.float32), "state", 0, "exp_avg_sq"),
        "exp_avg_sq of 'w' must have shape (2, 3); got (3, 2).",
    ),
    "last shape": (
        put(np.zeros(1), "state", 2, "exp_avg"),
        "exp_avg of 's' must have shape (); got (1,).",
    ),
    "ragged": (put([[1.0], [1.0, 2.0]], "state", 1, "exp_avg"), "state_dict must have the form"),
    "dtype": (
        put(np.zeros(5, int), "state", 1, "exp_avg"),
        "exp_avg of 'b' must be floating point; got int64.",
    ),
    "step": (put(-1.0, "state", 1, "step"), "step of 'b' must be a whole number >= 0; got -1.0."),
    "half a step": (put(0.5, "state", 1, "step"), "step of 'b' must be a whole number"),
    "step nan": (put(float("nan"), "state", 1, "step"), "step of 'b' must be a whole number"),
    "step is text": (put("two", "state", 1, "step"), "state_dict must have the form"),
    "mu_product": (
        put(1.5, "state", 2, "mu_product"),
        "mu_product of 's' must lie in [0, 1]; got 1.5.",
    ),
    "number of groups": (put([], "param_groups"), "param_groups must be 1; got 0."),
    "size of a group": (
        put([0, 1], "param_groups", 0, "params"),
        "params of param_groups[0] must be 3; got 2.",
    ),
    "one index twice": (
        put([1, 0, 1], "param_groups", 0, "params"),
        "params of param_groups must be unique; got [1, 0, 1].",
    ),
    "an index that is no key": (
        put([0, [], 2], "param_groups", 0, "params"),
        "state_dict must have the form",
    ),
    "group without params": (
        remove("param_groups", 0, "params"),
        "state_dict must have the form",
    ),
    "lr": (
        put(-1.0, "param_groups", 0, "lr"),
        "in param_groups[0] of the state dict, lr must be a finite number >= 0; got -1.0.",
    ),
    "betas": (
        put((0.9, 1.0), "param_groups", 0, "betas"),
        "in param_groups[0] of the state dict, betas[1] must lie in [0, 1); got 1.0.",
    ),
    "variant": (
        put("adam", "param_groups", 0, "variant"),
        "in param_groups[0] of the state dict, variant must be one of",
    ),
}


@BOTH_WAYS
@pytest.mark.parametrize("case", WRONG)
def test_a_whole_state_that_does_not_fit_is_refused(comm, opt, whole, alone, case):
    edit, told = WRONG[case]
    if errs(comm, alone):
        edit(whole)
    before = everything(opt)
    with refused(comm, CheckpointError, told, alone=alone):
        opt.load_state_dict(whole)
    assert everything(opt) == before


@pytest.mark.mpi(min_size=2)
def test_the_only_rank_that_has_a_state_may_be_wrong(comm, opt, whole):
    put(np.zeros(4), "state", 1, "exp_avg")(whole)
    before = everything(opt)
    with refused(comm, CheckpointError, "exp_avg of 'b' must have shape", alone=True):
        opt.load_state_dict(whole if is_last(comm) else None)
    assert everything(opt) == before


WRONG_PARTS = {
    "surplus parameter": WRONG["surplus parameter"],
    "missing moment": WRONG["missing moment"],
    "lr": WRONG["lr"],
    "no slices": (remove("state", 1, "slices"), "state of 'b' must have the keys exp_avg,"),
    "slices out of range": (
        put([(0, 7)], "state", 1, "slices"),
        "slices of 'b' must be ascending runs of its 5 elements; got [(0, 7)].",
    ),
    "slices in disorder": (put([(3, 5), (0, 3)], "state", 1, "slices"), "slices of 'b' must be"),
    "slices are no pairs": (put([7], "state", 1, "slices"), "state_dict must have the form"),
    "longer than its slices": (
        put(np.zeros(9, np.float32), "state", 0, "exp_avg"),
        "exp_avg of 'w' must have shape (",
    ),
    "no node": (remove("shardopt", "node"), "state_dict must have the form"),
}


@pytest.mark.mpi(min_size=2)
@BOTH_WAYS
@pytest.mark.parametrize("case", WRONG_PARTS)
def test_a_part_that_does_not_fit_is_refused(comm, nodes_opt, part, alone, case):
    edit, told = WRONG_PARTS[case]
    if errs(comm, alone):
        edit(part)
    before = everything(nodes_opt)
    with pytest.raises(CheckpointError) as caught:  # nodes may have nothing, and word it otherwise
        nodes_opt.load_state_dict(part)
    assert comm.allgather(str(caught.value)) == [str(caught.value)] * comm.size
    assert told in str(caught.value)
    assert everything(nodes_opt) == before


@pytest.mark.mpi(min_size=2)
def test_missing_parts_are_named(comm):
    big = Parameter(np.ones(3 * 4096 * comm.size, np.float32), "big")
    policy = ShardPolicy(timeout_s=20, share_node=False)
    with make_optimizer(comm, [big], policy=policy) as opt:
        take_step(opt)
        part = state_dict_of(opt)
        before = everything(opt)
        last = comm.size - 1
        told = f"must be whole on all ranks together; got nothing of node {last} of {comm.size}."
        with refused(comm, CheckpointError, told):
            opt.load_state_dict(None if is_last(comm) else part)
        del part["shardopt"]  # as versions before had none
        with refused(comm, CheckpointError, "got nothing of elements", "of 'big'"):
            opt.load_state_dict(None if is_last(comm) else part)
        assert everything(opt) == before
        assert_steps(opt)


@pytest.mark.mpi(min_size=2)
def test_a_parameter_without_an_entry_in_one_part_is_refused(comm, nodes_opt, part):
    holder = next(
        r for r, has in enumerate(comm.allgather(bool(part["state"][1]["slices"]))) if has
    )
    if comm.rank == holder:
        del part["state"][1]
    before = everything(nodes_opt)
    with refused(comm, CheckpointError, "got nothing of elements 0 to 5 of 'b'."):
        nodes_opt.load_state_dict(part)
    assert everything(nodes_opt) == before


@BOTH_WAYS
def test_the_state_of_another_model_is_refused(comm, opt, alone):
    params = [*make_params()[:2], Parameter(np.ones(7), "s")]
    with make_optimizer(comm, params) as other:
        take_step(other)
        theirs = comm.bcast(other.gather_state_dict())
    ours, before = comm.bcast(opt.gather_state_dict()), everything(opt)
    told = "exp_avg of 's' must have shape (); got (7,). Load it into the optimizer of the model"
    with refused(comm, CheckpointError, told, alone=alone):
        opt.load_state_dict(theirs if errs(comm, alone) else ours)
    assert everything(opt) == before


@BOTH_WAYS
@pytest.mark.parametrize("thing", [5, "checkpoint.npz", [1], object])
def test_what_is_no_state_is_refused(comm, opt, whole, alone, thing):
    before = everything(opt)
    with refused(comm, CheckpointError, "state_dict must have the", alone=alone):
        opt.load_state_dict(thing if errs(comm, alone) else whole)
    assert everything(opt) == before


def test_no_state_on_any_rank_is_refused(comm, opt):
    before = everything(opt)
    with refused(comm, CheckpointError, "state_dict must be there on some rank; got None"):
        opt.load_state_dict(None)
    assert everything(opt) == before


def test_a_state_that_shows_another_step_is_refused(comm, opt):
    shown, kept = opt.state_dict(), copy.deepcopy(opt.state_dict())
    step = int(shown["state"][1]["step"])
    for _ in range(2):
        opt.load_state_dict(shown)  # it changes nothing yet
    take_step(opt, 3.0)
    before = everything(opt)
    told = f"got one of step {step}, whose arrays show step {step + 1} by now. Take a deepcopy"
    with refused(comm, CheckpointError, told):
        opt.load_state_dict(shown)
    assert everything(opt) == before
    opt.load_state_dict(kept)
    assert repr(opt.state_dict()) == repr(kept)


def test_a_state_that_shows_another_run_at_the_same_step_is_refused(comm, opt, whole):
    opt.load_state_dict(whole)
    shown = opt.state_dict()
    take_step(opt, 3.0)
    opt.load_state_dict(whole)
    with refused(comm, CheckpointError, "Take a deepcopy"):
        opt.load_state_dict(shown)


@pytest.mark.mpi(min_size=2)
def test_states_of_different_steps_are_refused(comm, opt, whole):
    step = int(whole["state"][1]["step"])
    if is_last(comm):
        whole["state"][1]["step"] = 0.0
    before = everything(opt)
    told = differing(comm, "the state's steps", f"{[step] * 3}", f"{[step, 0, step]}")
    with refused(comm, RankMismatchError, told):
        opt.load_state_dict(whole)
    assert everything(opt) == before


@pytest.mark.mpi(min_size=2)
def test_states_of_different_hyperparameters_are_refused(comm, opt, whole):
    if is_last(comm):
        whole["param_groups"][0]["lr"] = 0.5
    before = everything(opt)
    told = ("the state's param_groups must be the same", "'lr': 0.002", "'lr': 0.5")
    with refused(comm, RankMismatchError, *told):
        opt.load_state_dict(whole)
    assert everything(opt) == before


def test_a_refused_state_may_be_mended_and_loaded(comm, opt, whole):
    broken = copy.deepcopy(whole)
    del broken["state"][2]["step"]
    with refused(comm, CheckpointError):
        opt.load_state_dict(broken)
    opt.load_state_dict(whole)
    again = comm.bcast(opt.gather_state_dict())
    assert repr(again) == repr(whole)
