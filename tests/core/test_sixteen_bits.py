"""16-bit parameters: masters in the owner's shard, sums in float32, overflows, loss scales."""

import copy

import numpy as np
import pytest

from shardopt import NAdam, ShardPolicy
from shardopt.errors import HyperparamsError, NonFiniteWarning
from tests.support.errors import refused, warned
from tests.support.oracle import Oracle, all_grads, assert_same, initial, make_params, write

pytestmark = pytest.mark.mpi

SIXTEEN = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def train(opt, params, comm, dtype, steps, oracle, scale=1.0):
    for step in steps:
        opt.zero_grad()
        grads = all_grads(step, comm, dtype)
        write(params, [grad * np.asarray(scale, dtype) for grad in grads[comm.rank]])
        opt.step(loss_scale=scale)
        oracle.step(grads)


@SIXTEEN
@pytest.mark.parametrize("bucket_nbytes", [1, 40_000, 32 << 20])
def test_bits_are_those_of_one_process(comm, dtype, bucket_nbytes):
    values = initial(dtype=dtype)
    params, oracle = make_params(values), Oracle(values, weight_decay=0.01)
    policy = ShardPolicy(bucket_nbytes=bucket_nbytes)
    with NAdam(params, weight_decay=0.01, comm=comm, policy=policy) as opt:
        train(opt, params, comm, dtype, range(20), oracle)
        assert_same(params, oracle)
        state = opt.gather_state_dict()
    if state is not None:
        for index, entry in state["state"].items():
            np.testing.assert_array_equal(entry["master"], oracle.masters[index])
            np.testing.assert_array_equal(entry["exp_avg"], oracle.exp_avg[index])
            assert entry["exp_avg_sq"].dtype == np.float32


@SIXTEEN
def test_small_updates_add_up(comm, dtype):
    params = make_params([np.full(5000, 1.0, dtype)])
    with NAdam(params, lr=1e-4, comm=comm) as opt:
        for _ in range(400):  # by 1e-4, where bfloat16 goes by 4e-3 and float16 by 5e-4
            params[0].grad[...] = 1
            opt.step()
    np.testing.assert_allclose(params[0].data.astype(float), 0.96, rtol=0.005)


@SIXTEEN
def test_a_master_follows_a_value_written_to(comm, dtype):
    params = make_params([np.full(5000, 1.001, dtype), np.full(3, 2.0, dtype)])
    with NAdam(params, lr=1e-4, comm=comm) as opt:
        params[0].grad[...] = params[1].grad[...] = 1
        opt.step()
        params[0].data[...] = -4
        params[0].grad[...] = params[1].grad[...] = 1
        opt.step()
        state = comm.bcast(opt.gather_state_dict())["state"]
    np.testing.assert_allclose(state[0]["master"], -4 - 1e-4, atol=3e-5)
    np.testing.assert_allclose(state[1]["master"], 2 - 2e-4, atol=3e-5)


@SIXTEEN
def test_deep_copied_and_gathered_states_go_on_to_the_same_bits(comm, dtype):
    values = initial(dtype=dtype)
    params, oracle = make_params(values), Oracle(values)
    with NAdam(params, comm=comm) as opt:
        train(opt, params, comm, dtype, range(5), oracle)
        saved = [param.data.copy() for param in params]
        states = copy.deepcopy(opt.state_dict()), opt.gather_state_dict()
        train(opt, params, comm, dtype, range(5, 9), oracle)
        assert_same(params, oracle)
    for state in states:
        again = make_params(saved)
        with NAdam(again, comm=comm) as opt:
            opt.load_state_dict(state)
            train(opt, again, comm, dtype, range(5, 9), Oracle(values))
            assert_same(again, oracle)


def test_a_state_without_masters_takes_them_from_the_parameters(comm):
    params = make_params(initial(dtype="bfloat16"))
    with NAdam(params, comm=comm) as opt:
        write(params, all_grads(0, comm, "bfloat16")[comm.rank])
        opt.step()
        state = comm.bcast(opt.gather_state_dict())
        for entry in state["state"].values():
            del entry["master"]
        opt.load_state_dict(state)
        opt.zero_grad()
        for group in opt.param_groups:
            group["lr"] = 0.0
        opt.step()
        after = comm.bcast(opt.gather_state_dict())["state"]
    for index, param in enumerate(params):
        np.testing.assert_array_equal(after[index]["master"], param.data.astype(np.float32))


@SIXTEEN
def test_an_overflow_on_one_rank_skips_the_step_on_all(comm, dtype):
    values = initial(dtype=dtype)
    params, oracle = make_params(values), Oracle(values)
    policy = ShardPolicy(check_finite=None if dtype == "float16" else True)
    with NAdam(params, comm=comm, policy=policy) as opt:
        train(opt, params, comm, dtype, range(2), oracle)
        params[3].grad[17] = np.inf if comm.rank == comm.size - 1 else 1
        with warned(comm, NonFiniteWarning):
            opt.step()
        assert opt.last_step.skipped
        assert_same(params, oracle)
        train(opt, params, comm, dtype, range(2, 4), oracle)
        assert not opt.last_step.skipped
        assert_same(params, oracle)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_has_the_range_of_float32_is_not_checked_unless_asked(comm, dtype):
    params = make_params(initial(dtype=dtype))
    with NAdam(params, comm=comm) as opt:
        params[3].grad[17] = np.nan if comm.rank == comm.size - 1 else 1
        with warned(comm, NonFiniteWarning, match="'p3' holds inf or NaN since step 1"):
            opt.step()
        assert not opt.last_step.skipped
        assert opt.last_step.grad_norm is None


@pytest.mark.filterwarnings("ignore::shardopt.errors.NonFiniteWarning")
def test_one_parameter_of_float16_has_all_checked(comm):
    params = make_params([np.ones(5000, "bfloat16"), np.ones(3, "float16")])
    with NAdam(params, comm=comm) as opt:
        params[0].grad[17] = np.inf if comm.rank == comm.size - 1 else 1
        opt.step()
        assert opt.last_step.skipped


@SIXTEEN
@pytest.mark.parametrize("bucket_nbytes", [1, 32 << 20])
@pytest.mark.parametrize("missing", [(), (2, 3, 4)])
def test_bits_of_clipped_steps_are_those_of_one_process(comm, dtype, bucket_nbytes, missing):
    values = initial(dtype=dtype)
    params, oracle = make_params(values), Oracle(values)
    policy = ShardPolicy(bucket_nbytes=bucket_nbytes)
    with NAdam(params, comm=comm, policy=policy) as opt:
        for step in range(6):
            opt.max_grad_norm = None if step == 3 else 1.0  # sums of earlier steps stay behind
            grads = all_grads(step, comm, dtype)
            if step in (2, 4):
                grads = [
                    [None if i in missing else g for i, g in enumerate(mine)] for mine in grads
                ]
            opt.zero_grad(set_to_none=True)
            for param, grad in zip(params, grads[comm.rank], strict=True):
                param.grad = grad
            opt.step()
            oracle.step(grads, factor=opt.last_step.clip_factor)
            assert_same(params, oracle)
            present = [[g for g in mine if g is not None] for mine in grads]
            if step != 3:
                assert opt.last_step.clip_factor < 1
                assert opt.last_step.grad_norm == pytest.approx(oracle.norm(present), rel=1e-6)


def test_sums_over_ranks_do_not_overflow(comm):
    params = make_params([np.ones(100, np.float16)])
    with NAdam(params, comm=comm, policy=ShardPolicy(check_finite=True)) as opt:
        params[0].grad[...] = 60_000
        opt.step()
        assert not opt.last_step.skipped
        assert opt.last_step.grad_norm == pytest.approx(60_000 * 10, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_loss_scales_are_taken_out(comm, dtype):
    values = initial(dtype=dtype)
    params, oracle = make_params(values), Oracle(values)
    with NAdam(params, comm=comm, max_grad_norm=1e9) as opt:
        train(opt, params, comm, dtype, range(4), oracle, scale=4.0)
        assert_same(params, oracle)
        assert opt.last_step.loss_scale == 4.0
        norm = oracle.norm(all_grads(3, comm, dtype))
        assert opt.last_step.grad_norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("kind", [np.float32, np.array, int])
def test_a_loss_scale_may_be_any_number(comm, kind):
    values = initial(dtype="float64")
    params, oracle = make_params(values), Oracle(values)
    with NAdam(params, comm=comm) as opt:
        train(opt, params, comm, "float64", range(3), oracle, scale=kind(4))
        assert_same(params, oracle)
        assert type(opt.last_step.loss_scale) is float


def test_loss_scales_may_differ_between_ranks(comm):
    values = initial()
    params, oracle = make_params(values), Oracle(values)
    with NAdam(params, comm=comm) as opt:
        for step in range(4):
            scale = 2.0 ** (4 + (comm.rank + step) % 2)
            grads = all_grads(step, comm)
            write(params, [grad * np.float32(scale) for grad in grads[comm.rank]])
            opt.step(loss_scale=scale)
            oracle.step(grads)
            assert_same(params, oracle)
            assert opt.last_step.loss_scale == (16 if comm.size > 1 or step % 2 == 0 else 32)


def test_an_overflow_that_one_rank_knows_of_skips_the_step_on_all(comm):
    values = initial()
    params = make_params(values)
    with NAdam(params, comm=comm) as opt:
        opt.step(loss_scale=8.0, overflowed=comm.rank == comm.size - 1)  # its scaler knows: no word
        assert opt.last_step.skipped
        assert opt.last_step.num_updated is None
        assert_same(params, Oracle(values))
        assert [entry["step"] for entry in opt.state_dict()["state"].values()] == [0] * len(params)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan, "much"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_loss_scale_out_of_range_is_refused(comm, scale, alone):
    with NAdam(make_params([np.ones(3, np.float32)]), comm=comm) as opt:
        mine = scale if not alone or comm.rank == comm.size - 1 else 2.0
        with refused(comm, HyperparamsError, "loss_scale must be", alone=alone):
            opt.step(loss_scale=mine)


def test_a_state_with_masters_goes_into_a_model_in_float32(comm):
    values = initial(dtype="bfloat16")
    params = make_params(values)
    with NAdam(params, comm=comm) as opt:
        write(params, all_grads(0, comm, "bfloat16")[comm.rank])
        opt.step()
        state = comm.bcast(opt.gather_state_dict())
    wide = make_params([value.astype(np.float32) for value in values])
    with NAdam(wide, comm=comm) as opt:
        opt.load_state_dict(state)
        again = comm.bcast(opt.gather_state_dict())["state"]
    for index, entry in again.items():
        np.testing.assert_array_equal(entry["exp_avg"], state["state"][index]["exp_avg"])
        assert "master" not in entry


@SIXTEEN
def test_memory_of_sixteen_bits(comm, dtype):
    numel = 1 << 20
    with NAdam(make_params([np.ones(numel, dtype)]), comm=comm) as opt:
        report = opt.memory_report()
        opt.max_grad_norm = 1.0
        clipping = opt.memory_report()
    sums = 4 if comm.size > 1 else 0  # the gradients of a single rank are the sum
    checks = dtype == "float16"
    assert report.masters_node_nbytes == 4 * numel
    assert report.node_nbytes == (2 + 2 * comm.size + 8 + 4 + checks * sums) * numel
    assert clipping.node_nbytes == (2 + 2 * comm.size + 8 + 4 + sums) * numel
    assert report.replicated_rank_nbytes == (2 + 2 + 8 + 4) * numel
