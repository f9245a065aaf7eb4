"""Moments of 8 bits, and bfloat16 without masters: the same bits for every layout and every way."""

import copy

import numpy as np
import pytest
from mpi4py import MPI

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.errors import (
    CheckpointError,
    CheckpointWarning,
    HyperparamsError,
    NonFiniteWarning,
    PartitionError,
)
from tests.support.errors import refused, warned
from tests.support.replicas import share as share  # a fixture

pytestmark = pytest.mark.mpi

SHAPES = [(9000,), (3, 5), (64, 70), (4096,)]
KINDS = {
    "8 bits": ("float32", {"optim_bits": 8}),
    "no masters": ("bfloat16", {"master_weights": False}),
    "both": ("bfloat16", {"optim_bits": 8, "master_weights": False}),
    "8 bits and masters": ("float16", {"optim_bits": 8}),
}
ALL = pytest.mark.parametrize("kind", KINDS)


def make_params(kind, shapes=SHAPES, prefix="w"):
    dtype = KINDS[kind][0]
    values = [np.linspace(-1, 1, int(np.prod(s))).reshape(s) for s in shapes]
    return [Parameter(v.astype(dtype), f"{prefix}{i}") for i, v in enumerate(values)]


def make_opt(kind, params, comm, **settings):
    policy = ShardPolicy(**{"bucket_nbytes": 40_000, **KINDS[kind][1], **settings})
    return NAdam(params, lr=0.01, weight_decay=0.01, comm=comm, policy=policy)


def grads_of(step, rank, params):
    """Gradients that sum up over ranks without rounding; the second one only in even steps."""
    rng = np.random.default_rng([step, rank])
    grads = [rng.integers(-8, 9, p.data.shape) / 16 for p in params]
    return [None if i == 1 and step % 2 else g for i, g in enumerate(grads)]


def train(opt, params, comm, steps):
    for step in steps:
        for param, grad in zip(params, grads_of(step, comm.rank, params), strict=True):
            param.grad = None if grad is None else grad.astype(param.data.dtype)
        opt.step()


def train_alone(opt, params, num_ranks, steps):
    """Take the same steps in one process, with the sums over all ranks."""
    for step in steps:
        everyone = [grads_of(step, rank, params) for rank in range(num_ranks)]
        for param, *grads in zip(params, *everyone, strict=True):
            param.grad = None if grads[0] is None else sum(grads).astype(param.data.dtype)
        opt.step(loss_scale=num_ranks)


def bits_of(params):
    return [param.data.tobytes() for param in params]


def state_bits(state_dict):
    return [
        {key: np.asarray(value).tobytes() for key, value in entry.items()}
        for entry in state_dict["state"].values()
    ]


@ALL
def test_bits_are_those_of_one_process(comm, share, kind):
    params, alone = make_params(kind), make_params(kind)
    with make_opt(kind, params, comm, share_node=share, threads=2) as opt:
        train(opt, params, comm, range(4))
        state = opt.gather_state_dict()
    with make_opt(kind, alone, MPI.COMM_SELF, bucket_nbytes=None) as opt:
        train_alone(opt, alone, comm.size, range(4))
        expected = opt.gather_state_dict()
    assert bits_of(params) == bits_of(alone)
    if comm.rank == 0:
        assert state_bits(state) == state_bits(expected)
        assert ("master" in state["state"][0]) is (kind == "8 bits and masters")


@ALL
@pytest.mark.filterwarnings("ignore::shardopt.errors.PartialStateWarning")
@pytest.mark.parametrize("how", ["gathered", "state_dict"])
def test_a_resumed_run_goes_on_bit_for_bit(comm, share, kind, how):
    params = make_params(kind)
    with make_opt(kind, params, comm, share_node=share) as opt:
        train(opt, params, comm, range(3))
        state = opt.gather_state_dict() if how == "gathered" else copy.deepcopy(opt.state_dict())
        resumed = make_params(kind)
        for param, value in zip(resumed, params, strict=True):
            param.data[...] = value.data
        train(opt, params, comm, range(3, 6))
    with make_opt(kind, resumed, comm, bucket_nbytes=1 << 20) as opt:  # on one node
        opt.load_state_dict(state)
        train(opt, resumed, comm, range(3, 6))
    assert bits_of(resumed) == bits_of(params)


@ALL
def test_other_parameters_change_no_bits(comm, kind):
    params, alone = make_params(kind), make_params(kind)
    more = make_params(kind, [(5000,), (17,)], prefix="x")
    with make_opt(kind, alone, comm) as opt:
        train(opt, alone, comm, range(4))
    with make_opt(kind, params, comm) as opt:
        train(opt, params, comm, range(2))
        opt.add_param_group({"params": more, "lr": 0.1})
        train(opt, params, comm, range(2, 4))
    assert bits_of(params) == bits_of(alone)


@ALL
def test_a_step_that_is_skipped_uses_no_random_numbers_up(comm, kind):
    params, alone = make_params(kind), make_params(kind)
    with make_opt(kind, alone, comm, check_finite=True) as opt:
        train(opt, alone, comm, range(4))
    with make_opt(kind, params, comm, check_finite=True) as opt:
        train(opt, params, comm, range(2))
        params[0].grad = np.full_like(params[0].data, np.nan)
        with warned(comm, NonFiniteWarning, "skipped"):
            opt.step()
        train(opt, params, comm, range(2, 4))
    assert bits_of(params) == bits_of(alone)


def test_seeds_make_a_difference(comm):
    trained = []
    for seed in (0, 1):
        params = make_params("both")
        with make_opt("both", params, comm, seed=seed) as opt:
            train(opt, params, comm, range(2))
        trained.append(bits_of(params))
    assert trained[0] != trained[1]


@ALL
def test_nothing_moves_without_a_gradient(comm, kind):
    params = make_params(kind)
    with make_opt(kind, params, comm) as opt:
        train(opt, params, comm, range(2))
        before = opt.gather_state_dict()
        for param in params[1:]:
            param.grad = np.ones_like(param.data)
        params[0].grad = None
        values = params[0].data.tobytes()
        opt.step()
        after = opt.gather_state_dict()
        assert params[0].data.tobytes() == values
    if comm.rank == 0:
        assert state_bits(before)[0] == state_bits(after)[0]
        assert state_bits(before)[2] != state_bits(after)[2]


def test_small_parameters_and_groups_may_keep_32_bits(comm):
    params = make_params("8 bits")
    policy = ShardPolicy(optim_bits=8)
    groups = [{"params": params[:2]}, {"params": params[2:3], "optim_bits": 32}]
    with NAdam(groups, comm=comm, policy=policy) as opt:
        opt.add_param_group({"params": params[3:]})
        assert [p.spec.form.optim_bits for p in opt.partition.params] == [8, 32, 32, 8]
        report = opt.memory_report()
        numel = 9216 + 4352, 256 + 4608
        expected = 2 * (12_288 + 4096) // 256 * 260 + 8 * 8192
        assert report.moments_node_nbytes == expected, numel


# -- what users see of it, and do to it ------------------------------------------------------------


def test_the_state_shows_values_of_codes(comm):
    params = make_params("8 bits")
    with make_opt("8 bits", params, comm) as opt:
        for param in params:
            param.grad = np.full_like(param.data, 0.5)
        opt.step()
        shown = opt.state[params[0]]["exp_avg"]
        np.testing.assert_allclose(shown, 0.1 * 0.5, rtol=0.07)
        assert opt.state[params[0]]["exp_avg"] is shown
        with pytest.raises(ValueError, match="read-only"):
            shown[0] = 1
        with pytest.raises(ValueError, match="cannot set WRITEABLE flag"):
            shown.flags.writeable = True
        opt.step()
        assert (opt.state[params[0]]["exp_avg"] > shown).all()
        assert opt.state[params[1]]["exp_avg"].flags.writeable
        entry, last = opt.state[params[0]], np.array(opt.state[params[0]]["exp_avg"])
    np.testing.assert_array_equal(entry["exp_avg"], last)  # also once the optimizer is closed


def test_values_put_into_the_state_hold(comm):
    params = make_params("8 bits")
    with make_opt("8 bits", params, comm) as opt:
        train(opt, params, comm, range(2))
        before = np.array(opt.state[params[0]]["exp_avg"])
        opt.param_groups[0]["weight_decay"] = 0.0
        opt.state[params[0]]["exp_avg_sq"] = np.full(SHAPES[0], 0.3, np.float32)
        for param in params:
            param.grad = np.zeros_like(param.data)
        opt.step()
        np.testing.assert_allclose(opt.state[params[0]]["exp_avg_sq"], 0.3, rtol=0.1)
        after = opt.state[params[0]]["exp_avg"]
        large = np.abs(before) > np.abs(before).max() / 100
        np.testing.assert_allclose(after[large], 0.9 * before[large], rtol=0.2)
        opt.reset_state([params[0]])
        opt.step()
        assert not np.any(opt.state[params[0]]["exp_avg"])


def test_moments_of_32_bits_are_loaded_and_back(comm):
    wide, narrow = (make_params("8 bits") for _ in range(2))
    with make_opt("8 bits", wide, comm, optim_bits=32) as opt:
        train(opt, wide, comm, range(3))
        state = copy.deepcopy(opt.gather_state_dict())
    with make_opt("8 bits", narrow, comm) as opt:
        with warned(comm, CheckpointWarning, "has rounded moments to 8 bits"):
            opt.load_state_dict(state)
        rounded = opt.gather_state_dict()
    with make_opt("8 bits", wide, comm, optim_bits=32) as opt:
        opt.load_state_dict(rounded)
        again = opt.gather_state_dict()
    if comm.rank == 0:
        for key, scale in ("exp_avg", 2**-15), ("exp_avg_sq", 2**-31):
            full, short = state["state"][0][key], rounded["state"][0][key]
            np.testing.assert_allclose(short, full, rtol=0.07, atol=2 * scale * full.max())
        assert state_bits(again) == state_bits(rounded)


def test_masters_that_are_left_out_are_reported(comm):
    params = make_params("no masters")
    with make_opt("no masters", params, comm, master_weights=None) as opt:
        train(opt, params, comm, range(1))
        state = opt.gather_state_dict()  # None on other ranks
    with make_opt("no masters", params, comm) as opt:
        with warned(comm, CheckpointWarning, "has left masters out"):
            opt.load_state_dict(state)
        train(opt, params, comm, range(1, 2))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "settings", "message"),
    [
        ("float16", {"master_weights": False}, "must be bfloat16 for master_weights=False"),
        ("float64", {"optim_bits": 8}, "must be float32, bfloat16 or float16 for moments"),
    ],
)
def test_dtypes_that_cannot_do_with_less_are_refused(comm, dtype, settings, message):
    params = [Parameter(np.ones(5000, dtype), "w")]
    with refused(comm, PartitionError, message):
        NAdam(params, comm=comm, policy=ShardPolicy(**settings))


def test_float32_has_no_masters_to_do_without(comm):
    trained = []
    for masters in (None, False):
        params = make_params("8 bits")
        with make_opt("8 bits", params, comm, optim_bits=32, master_weights=masters) as opt:
            train(opt, params, comm, range(2))
        trained.append(bits_of(params))
    assert trained[0] == trained[1]


def test_bits_of_a_group_cannot_change_later(comm):
    params = make_params("8 bits")
    with make_opt("8 bits", params, comm) as opt:
        opt.param_groups[0]["optim_bits"] = 32
        with refused(comm, HyperparamsError, "must stay as it was"):
            opt.step()
        del opt.param_groups[0]["optim_bits"]
        moved = opt.param_groups[0]["params"].pop(0)
        opt.param_groups.append({"params": [moved], "optim_bits": 32})
        with refused(comm, HyperparamsError, "of the group of parameter 'w0' must stay 8"):
            opt.step()
        train(opt, params, comm, range(2))


def test_odd_bits_are_refused(comm):
    params = make_params("8 bits")
    with refused(comm, HyperparamsError, "must be 8 or 32; got 4"):
        NAdam([{"params": params, "optim_bits": 4}], comm=comm)
    for name, value in ("optim_bits", 16), ("seed", -1), ("seed", 1 << 64), ("master_weights", 0):
        with pytest.raises(HyperparamsError, match=name):
            ShardPolicy(**{name: value})


def test_a_part_that_is_not_of_this_form_is_refused(comm):
    params = make_params("8 bits")
    with make_opt("8 bits", params, comm) as opt:
        train(opt, params, comm, range(1))
        state = comm.bcast(opt.gather_state_dict())
        state["state"][0]["exp_avg"] = np.zeros(SHAPES[0], np.uint8)
        with refused(comm, CheckpointError, "must be floating point"):
            opt.load_state_dict(state)
