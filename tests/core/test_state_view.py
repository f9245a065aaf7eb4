"""``opt.state``: what is there is read in place, and what all ranks write there holds."""

import copy
import warnings

import numpy as np
import pytest

from shardopt.errors import (
    CheckpointError,
    ClosedError,
    DivergedWarning,
    PartitionError,
    RankMismatchError,
)
from shardopt.numpy import NAdam, Parameter
from shardopt.policy import ShardPolicy
from tests.support.errors import (
    BOTH_WAYS,
    errs,
    is_last,
    make_optimizer,
    params_of,
    refused,
    take_step,
    warned,
)

pytestmark = pytest.mark.mpi

KEYS = ["step", "mu_product", "exp_avg", "exp_avg_sq"]
NODES = ShardPolicy(timeout_s=20, share_node=False)


def big_params(comm):
    """Two parameters, the first of which every rank owns a part of."""
    big = np.linspace(-1, 1, 2 * 4096 * comm.size, dtype=np.float32)
    return [Parameter(big, "big"), Parameter(np.ones((2, 3)), "small")]


@pytest.fixture
def big_opt(comm):
    """An optimizer that has stepped twice and must still step after the test."""
    with make_optimizer(
        comm, big_params(comm), policy=ShardPolicy(timeout_s=20, bucket_nbytes=1)
    ) as opt:
        take_step(opt)
        take_step(opt, 2.0)
        yield opt
        take_step(opt)


def gathered(opt):
    return opt.comm.bcast(opt.gather_state_dict())["state"]


def assert_same_everywhere(opt):
    """All ranks must read the same parameters and state, which is also that of the owners."""
    ours = repr(opt.state_dict()["state"])
    assert opt.comm.allgather(ours) == [ours] * opt.comm.size
    assert ours == repr(gathered(opt))


def test_the_state_before_the_first_step(comm):
    params = big_params(comm)
    with make_optimizer(comm, params) as opt:
        assert isinstance(opt.state, dict)
        assert list(opt.state) == params
        assert len(opt.state) == 2
        assert [list(entry) for entry in opt.state.values()] == [KEYS] * 2
        for param, entry in opt.state.items():
            assert param in opt.state
            assert (entry["step"], entry["mu_product"]) == (0, 1)
            assert entry["exp_avg"].shape == param.data.shape
            assert not entry["exp_avg"].any()
            assert not entry["exp_avg_sq"].any()


def test_every_rank_reads_the_whole_state(comm, big_opt):
    entries, params = dict(big_opt.state), params_of(big_opt)
    for _ in range(2):  # what was asked for before goes with the steps
        state = gathered(big_opt)
        for index, param in enumerate(params):
            for key in KEYS:
                np.testing.assert_array_equal(entries[param][key], state[index][key])
        take_step(big_opt, 0.5)
    assert entries[params[0]]["step"] == 4
    assert big_opt.last_step.copied_nbytes == 0


def test_copies_are_plain_dicts(comm, big_opt):
    big = params_of(big_opt)[0]
    for taken in (copy.deepcopy(big_opt.state[big]), big_opt.state[big].copy()):
        assert type(taken) is dict
    kept = copy.deepcopy(big_opt.state)
    assert type(kept) is dict
    assert big not in kept  # the keys are copies as well
    saved = {param: copy.deepcopy(entry) for param, entry in big_opt.state.items()}
    take_step(big_opt)
    assert saved[big]["step"] == 2
    assert big_opt.state[big]["step"] == 3
    assert not np.array_equal(saved[big]["exp_avg"], big_opt.state[big]["exp_avg"])


def scale_in_place(opt, big):
    opt.state[big]["exp_avg"][:] *= 0.5


def assign(opt, big):
    opt.state[big]["exp_avg"] = opt.state[big]["exp_avg"] * 0.5


def assign_an_entry(opt, big):
    opt.state[big] = {**opt.state[big], "exp_avg": opt.state[big]["exp_avg"] * 0.5}


def update_an_entry(opt, big):
    opt.state[big].update(exp_avg=opt.state[big]["exp_avg"] * 0.5)


def assign_all(opt, big):
    opt.state = {
        p: {k: v * (0.5 if (p, k) == (big, "exp_avg") else 1) for k, v in e.items()}
        for p, e in opt.state.items()
    }


@pytest.mark.parametrize(
    "write", [scale_in_place, assign, assign_an_entry, update_an_entry, assign_all]
)
@pytest.mark.parametrize("then", ["step", "gather", "state_dict"])
def test_moments_that_all_ranks_write_hold(comm, big_opt, write, then):
    big = params_of(big_opt)[0]
    expected = gathered(big_opt)[0]["exp_avg"] * np.float32(0.5)
    before = gathered(big_opt)
    write(big_opt, big)
    if then == "step":
        beta = np.float32(0.9)
        take_step(big_opt)
        np.testing.assert_allclose(
            big_opt.state[big]["exp_avg"], expected * beta + np.float32(1 - 0.9), rtol=1e-5
        )
        assert big_opt.state[big]["step"] == 3
    elif then == "gather":
        after = gathered(big_opt)
        np.testing.assert_array_equal(after[0].pop("exp_avg"), expected)
        del before[0]["exp_avg"]
        assert repr(after) == repr(before)
    else:
        np.testing.assert_array_equal(big_opt.state_dict()["state"][0]["exp_avg"], expected)
    assert_same_everywhere(big_opt)


def test_moments_may_be_exchanged(comm):
    params = [Parameter(np.full(5000, value, np.float32)) for value in (1.0, 2.0)]
    with make_optimizer(comm, params) as opt:
        for param, value in zip(params, (1.0, 2.0), strict=True):
            param.grad += value
        opt.step()
        first, second = (opt.state[param]["exp_avg"] for param in params)
        before = gathered(opt)
        opt.state[params[0]]["exp_avg"], opt.state[params[1]]["exp_avg"] = second, first
        after = gathered(opt)
        assert np.array_equal(after[0]["exp_avg"], before[1]["exp_avg"])
        assert np.array_equal(after[1]["exp_avg"], before[0]["exp_avg"])


@pytest.mark.parametrize("in_place", [True, False])
def test_step_counts_that_all_ranks_write_hold(comm, big_opt, in_place):
    big, small = params_of(big_opt)
    entry, mu_product = big_opt.state[big], float(big_opt.state[small]["mu_product"])
    if in_place:
        entry["step"][...] = 7
    else:
        entry["step"], entry["mu_product"] = 7.0, 0.25
    assert big_opt.state_dict()["state"][0]["step"] == 7
    assert gathered(big_opt)[0]["step"] == 7
    take_step(big_opt)
    assert (entry["step"], big_opt.state[small]["step"]) == (8, 3)
    assert (entry["mu_product"] < 0.25) or in_place
    assert big_opt.state[small]["mu_product"] < mu_product
    assert_same_everywhere(big_opt)


def clear(opt, params):
    opt.state.clear()


def delete(opt, params):
    for param in params:
        del opt.state[param]


def pop(opt, params):
    for param in params:
        assert list(opt.state.pop(param)) == KEYS
        assert opt.state.pop(param, None) is None


def empty(opt, params):
    opt.state = {}


def reset(opt, params):
    opt.reset_state()


def reset_listed(opt, params):
    opt.reset_state(iter(params))


@pytest.mark.parametrize("remove", [clear, delete, pop, empty, reset, reset_listed])
@pytest.mark.parametrize("touched", [False, True])
def test_a_state_that_was_removed_starts_anew(comm, big_opt, remove, touched):
    params = params_of(big_opt)
    if touched:  # what was written before is gone, too
        big_opt.state[params[0]]["exp_avg"][:] = 5
        big_opt.state[params[0]]["step"][...] = 5
    remove(big_opt, params)
    assert not big_opt.state
    assert params[0] not in big_opt.state
    assert big_opt.state_dict()["state"] == {}
    values = [param.data.copy() for param in params]
    take_step(big_opt)
    assert list(big_opt.state) == params
    assert [entry["step"] for entry in big_opt.state.values()] == [1, 1]
    assert_same_everywhere(big_opt)
    fresh = [Parameter(value) for value in values]
    with make_optimizer(comm, fresh) as other:
        take_step(other)
        assert repr(gathered(other)) == repr(gathered(big_opt))
        for ours, theirs in zip(params, fresh, strict=True):
            np.testing.assert_array_equal(ours.data, theirs.data)


def test_one_parameter_starts_anew_at_a_save(comm, big_opt):
    big, small = params_of(big_opt)
    before = gathered(big_opt)
    big_opt.reset_state([big])
    assert dict(big_opt.state[big]) == {}
    state = gathered(big_opt)
    assert state[0]["step"] == 0
    assert not state[0]["exp_avg"].any()
    assert repr(state[1]) == repr(before[1])
    assert list(big_opt.state) == [small, big]
    assert_same_everywhere(big_opt)


def test_an_entry_may_be_put_back(comm, big_opt):
    big = params_of(big_opt)[0]
    kept, before = copy.deepcopy(big_opt.state[big]), gathered(big_opt)
    del big_opt.state[big]
    for key, value in kept.items():
        big_opt.state[big][key] = value
    assert repr(gathered(big_opt)) == repr(before)


def test_the_same_arrays_put_back_are_no_change(comm, big_opt):
    for param, entry in big_opt.state.items():  # as trainers move a state to a device
        big_opt.state[param] = type(entry)([(key, entry[key][...]) for key in entry])
    take_step(big_opt)
    assert big_opt.last_step.copied_nbytes == 0


WRONG = {
    "shape": (
        lambda opt, big: opt.state[big].update(exp_avg=np.ones(3, np.float32)),
        "exp_avg of 'big' must have shape",
    ),
    "dtype": (
        lambda opt, big: opt.state[big].update(exp_avg=np.ones(big.data.shape, int)),
        "exp_avg of 'big' must be floating point; got int64.",
    ),
    "unknown key": (
        lambda opt, big: opt.state[big].update(note=1),
        "opt.state of 'big' must be a dict with the keys step, mu_product, exp_avg, exp_avg_sq;",
    ),
    "missing key": (
        lambda opt, big: opt.state[big].pop("exp_avg"),
        "opt.state of 'big' must be a dict with the keys step, mu_product, exp_avg, exp_avg_sq;",
    ),
    "no dict": (lambda opt, big: opt.state.update({big: 3}), "be a dict with the keys"),
    "text": (lambda opt, big: opt.state[big].update(step="two"), "got ValueError"),
    "half a step": (
        lambda opt, big: opt.state[big]["step"].fill(0.5),
        "step of 'big' must be a whole number >= 0; got 0.5.",
    ),
    "mu_product": (
        lambda opt, big: opt.state[big].update(mu_product=2.0),
        "mu_product of 'big' must lie in [0, 1]; got 2.0.",
    ),
    "nan": (lambda opt, big: opt.state[big]["step"].fill(np.nan), "must be a whole number"),
    "stranger": (
        lambda opt, big: opt.state.update({"big": {}}),
        "opt.state must have entries for the parameters of this optimizer only; got ['big'].",
    ),
}


@BOTH_WAYS
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_raises_on_every_rank(comm, big_opt, case, alone):
    write, told = WRONG[case]
    big = params_of(big_opt)[0]
    kept, before = copy.deepcopy(dict(big_opt.state[big])), gathered(big_opt)
    if errs(comm, alone):
        write(big_opt, big)
    for _ in range(2):
        with refused(comm, CheckpointError, told, alone=alone):
            big_opt.step()
    with refused(comm, CheckpointError, told, alone=alone):
        big_opt.gather_state_dict()
    big_opt.state.pop("big", None)
    big_opt.state[big] = kept
    assert repr(gathered(big_opt)) == repr(before)


ALONE = {
    "reset": (lambda opt, big: opt.reset_state([big]), "a reset of its state on rank"),
    "step": (lambda opt, big: opt.state[big]["step"].fill(9), "a step of 9.0 on rank"),
    "moment": (lambda opt, big: opt.state[big]["exp_avg"].fill(9), "exp_avg of parameter 'big'"),
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("case", ALONE)
@pytest.mark.parametrize("of", ["none", "the last"])
def test_what_one_rank_does_alone_is_refused_until_ranks_agree(comm, big_opt, case, of):
    write, told = ALONE[case]
    big, before = params_of(big_opt)[0], gathered(big_opt)
    if is_last(comm):
        write(big_opt, big)
    with pytest.raises(RankMismatchError) as caught:
        big_opt.step()
    text = str(caught.value)
    assert comm.allgather(text) == [text] * comm.size
    assert "'big'" in text
    assert told in text
    source = comm.size - 1 if of == "the last" else 0
    big_opt.adopt(source)
    after = gathered(big_opt)
    if of == "none":
        assert repr(after) == repr(before)
    else:
        assert repr(after[0]) != repr(before[0])
        assert repr(after[1]) == repr(before[1])
        assert after[0]["step"] == {"reset": 0, "step": 9, "moment": 2}[case]
        assert (after[0]["exp_avg"] == 9).all() == (case == "moment")
    assert_same_everywhere(big_opt)


@pytest.mark.mpi(min_size=2)
def test_ranks_that_write_different_steps_are_refused(comm, big_opt):
    big_opt.state[params_of(big_opt)[0]]["step"][...] = 10 + comm.rank
    with pytest.raises(RankMismatchError, match=r"a step of 10.0 on rank 0 and a step of 11.0 on"):
        big_opt.step()
    big_opt.adopt(1)
    assert gathered(big_opt)[0]["step"] == 11


@pytest.mark.mpi(min_size=2)
def test_ranks_that_write_different_moments_are_warned(comm, big_opt):
    big_opt.state[params_of(big_opt)[0]]["exp_avg"][:] = comm.rank
    with warned(comm, DivergedWarning, "exp_avg of parameter 'big'"):
        big_opt.step()
    assert_same_everywhere(big_opt)


def test_a_load_replaces_what_was_written(comm, big_opt):
    saved = comm.bcast(big_opt.gather_state_dict())
    take_step(big_opt)
    for entry in big_opt.state.values():
        entry["step"][...] = 0
        entry["exp_avg"][...] = 3
    big_opt.reset_state(params_of(big_opt)[1:])
    big_opt.load_state_dict(saved)
    assert repr(big_opt.state_dict()["state"]) == repr(saved["state"])
    assert len(big_opt.state) == 2
    assert_same_everywhere(big_opt)


def test_parameters_added_later_have_entries(comm, big_opt):
    entry = big_opt.state[params_of(big_opt)[0]]
    extra = Parameter(np.ones(4), "extra")
    big_opt.add_param_group({"params": [extra]})
    assert list(big_opt.state)[-1] is extra
    assert big_opt.state[extra]["step"] == 0
    assert entry["step"] == 2
    take_step(big_opt)
    assert (big_opt.state[extra]["step"], entry["step"]) == (1, 3)


def test_only_parameters_of_the_optimizer_are_reset(comm, big_opt):
    with pytest.raises(PartitionError, match="params must be parameters of this optimizer"):
        big_opt.reset_state([Parameter(np.ones(3))])
    with pytest.raises(KeyError):
        big_opt.state[Parameter(np.ones(3))]
    assert len(big_opt.state) == 2


@pytest.mark.mpi(min_size=2)
@pytest.mark.filterwarnings("ignore::shardopt.errors.PartialStateWarning")
def test_several_nodes_have_step_counts_only(comm):
    params = big_params(comm)
    with make_optimizer(comm, params, policy=NODES) as opt:
        take_step(opt)
        entry = opt.state[params[0]]
        assert list(entry) == ["step", "mu_product"]
        assert entry["step"] == 1
        with pytest.raises(KeyError, match=r"gather_state_dict\(\)"):
            entry["exp_avg"]
        entry["step"][...] = 5
        take_step(opt)
        assert entry["step"] == 6
        part = opt.state_dict()["state"][0]
        part["exp_avg"][:] = 0.5
        before = part["exp_avg"].copy()
        assert (gathered(opt)[0]["exp_avg"] == 0.5).all()
        assert (before == 0.5).all()
        opt.reset_state()
        state = gathered(opt)
        assert [each["step"] for each in state.values()] == [0, 0]
        assert not any(each["exp_avg"].any() for each in state.values())
        opt.state[params[0]]["exp_avg"] = np.ones(params[0].data.shape, np.float32)
        with pytest.raises(CheckpointError, match="be a dict with the keys step, mu_product;"):
            opt.step()
        del opt.state[params[0]]
        take_step(opt)


def test_what_users_hold_outlives_the_optimizer(comm):
    params = big_params(comm)
    with make_optimizer(comm, params) as opt:
        take_step(opt)
        state, entry = opt.state, opt.state[params[1]]
        expected = copy.deepcopy(entry)
    assert repr(dict(entry)) == repr(expected)
    assert list(state) == params
    assert state[params[0]]["step"] == 1
    entry["note"] = 1
    with pytest.raises(ClosedError):
        opt.state  # noqa: B018


def test_masters_are_there_for_16_bits(comm):
    params = [Parameter(np.linspace(1, 2, 9000).astype("float16"))]
    with NAdam(params, comm=comm, lr=1e-4) as opt:
        take_step(opt)
        assert list(opt.state[params[0]]) == [*KEYS, "master"]
        opt.state[params[0]]["master"][:] = 3.0
        opt.gather_state_dict()
        assert (params[0].data == 3.0).all()
        assert (opt.state[params[0]]["master"] == 3.0).all()


def test_a_step_looks_at_nothing_that_was_not_asked_for(comm, monkeypatch):
    with make_optimizer(comm, big_params(comm)) as opt:
        take_step(opt)
        view = opt.core.states._view
        monkeypatch.setattr(view, "_take_over", None)
        assert view.stored is None
        take_step(opt)
        entry = opt.state[params_of(opt)[0]]
        take_step(opt)  # nor at what was only read
        assert entry["step"] == 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt.state_dict()
