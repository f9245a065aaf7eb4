"""A step on any number of ranks is the step of one process, bit for bit."""

from contextlib import nullcontext

import numpy as np
import pytest

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.errors import NoGradientWarning
from tests.support.errors import warned
from tests.support.oracle import SHAPES, Oracle, all_grads, assert_same, initial, make_params, write

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bucket_nbytes", [1, 40_000, 32 << 20])
@pytest.mark.parametrize("threads", [1, 2])
def test_fifty_steps_bit_for_bit(comm, dtype, bucket_nbytes, threads):
    values = initial(dtype=dtype)
    params, oracle = make_params(values), Oracle(values, weight_decay=0.01, lr=0.01)
    policy = ShardPolicy(bucket_nbytes=bucket_nbytes, threads=threads)
    with NAdam(params, lr=0.01, weight_decay=0.01, comm=comm, policy=policy) as opt:
        for step in range(50):
            grads = all_grads(step, comm, dtype)
            opt.zero_grad()
            write(params, grads[comm.rank])
            lr = 0.01 / (1 + step)
            opt.param_groups[0]["lr"] = lr
            opt.step()
            oracle.step(grads, lr=lr)
            assert opt.last_step.copied_nbytes == 0
        assert_same(params, oracle)
        assert opt.last_step.step == 50
        state = opt.gather_state_dict()
    if comm.rank == 0:
        for index in range(len(SHAPES)):
            np.testing.assert_array_equal(state["state"][index]["exp_avg"], oracle.exp_avg[index])
            moment = state["state"][index]["exp_avg_sq"]
            np.testing.assert_array_equal(moment, oracle.exp_avg_sq[index])
    else:
        assert state is None
    assert_same(params, oracle)  # after close()


@pytest.mark.parametrize("variant", ["torch", "keras", "optax", "lucid"])
def test_variants_and_maximize(comm, variant):
    values = initial()
    hyper = {"variant": variant, "maximize": True, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    params, oracle = make_params(values), Oracle(values, **hyper)
    with NAdam(params, comm=comm, **hyper) as opt:
        for step in range(3):
            grads = all_grads(step, comm)
            write(params, grads[comm.rank])
            opt.step()
            oracle.step(grads)
        assert_same(params, oracle)


def test_rank_0_decides_the_initial_values(comm):
    params = make_params(initial(seed=comm.rank))
    with NAdam(params, comm=comm):
        for param, value in zip(params, initial(seed=0), strict=True):
            np.testing.assert_array_equal(param.data, value)


def test_a_node_has_one_copy(comm):
    params = make_params(initial())
    with NAdam(params, comm=comm) as opt:
        (buffers,) = opt.core.parts.memory.buffers
        node_param = buffers.node_param(opt.partition.params[3])
        comm.Barrier()
        if comm.rank == comm.size - 1:
            node_param[...] = 7.0
        comm.Barrier()
        assert (params[3].data == 7.0).all()
        comm.Barrier()
        params[3].data[...] = comm.rank  # makes a copy of this rank's own
        comm.Barrier()
        assert (params[3].data == comm.rank).all()
        assert (node_param == 7.0).all()


def test_groups_have_their_own_hyperparameters_and_dtypes(comm):
    single, double = initial(), initial(dtype="float64", seed=1)
    singles, doubles = make_params(single), make_params(double)
    for param in doubles:
        param.name += "_double"
    groups = [
        {"params": singles[:4], "lr": 0.1},
        {"params": doubles, "betas": (0.5, 0.9)},
        {"params": singles[4:], "weight_decay": 0.5, "decoupled_weight_decay": True},
    ]
    oracles = [
        Oracle(single[:4], lr=0.1),
        Oracle(double, betas=(0.5, 0.9)),
        Oracle(single[4:], weight_decay=0.5, decoupled_weight_decay=True),
    ]
    with NAdam(groups, comm=comm, policy=ShardPolicy(bucket_nbytes=50_000)) as opt:
        for step in range(4):
            for group, oracle in zip(groups, oracles, strict=True):
                dtype, shapes = oracle.params[0].dtype.name, [p.shape for p in oracle.params]
                grads = all_grads(step, comm, dtype, shapes)
                write(group["params"], grads[comm.rank])
                oracle.step(grads)
            opt.step()
        for group, oracle in zip(opt.param_groups, oracles, strict=True):
            assert_same(group["params"], oracle)


def test_params_without_gradient_stand_still(comm):
    values = initial()
    params, oracle = make_params(values), Oracle(values)
    with NAdam(params, comm=comm) as opt:
        for step in range(12):
            grads = all_grads(step, comm)
            for rank in range(comm.size):
                for index in range(len(SHAPES)):
                    # Some are missing everywhere, some on some ranks only.
                    if step % (index + 2) == 0 or (step * index + rank) % 5 == 0:
                        grads[rank][index] = None
            opt.zero_grad()
            for param, grad in zip(params, grads[comm.rank], strict=True):
                if grad is None:
                    param.grad = None
                else:
                    param.grad[...] = grad
            none = all(grad is None for rank in grads for grad in rank)
            with warned(comm, NoGradientWarning) if none else nullcontext():
                opt.step()
            oracle.step(grads)
            assert_same(params, oracle)
        step_counts = [
            (entry["step"], entry["mu_product"]) for entry in opt.state_dict()["state"].values()
        ]
    assert step_counts == [(clock.step, clock.mu_product) for clock in oracle.step_counts]
    assert len(set(step_counts)) > 2


def test_zero_grad(comm):
    params = make_params(initial())
    with NAdam(params, comm=comm) as opt:
        write(params, all_grads(0, comm)[comm.rank])
        views = [param.grad for param in params]
        opt.zero_grad()
        assert all(param.grad is view for param, view in zip(params, views, strict=True))
        assert not any(view.any() for view in views)
        opt.zero_grad(set_to_none=True)
        assert all(param.grad is None for param in params)
        before = [param.data.copy() for param in params]
        with warned(comm, NoGradientWarning):
            opt.step()
        opt.step()  # told once
        assert opt.last_step.num_updated == 0
        for param, value in zip(params, before, strict=True):
            np.testing.assert_array_equal(param.data, value)
        opt.zero_grad()
        assert all(param.grad is view for param, view in zip(params, views, strict=True))


def test_closure_runs_first_and_its_value_is_returned(comm):
    values = initial()
    params, oracle = make_params(values), Oracle(values)
    grads = all_grads(0, comm)

    def closure():
        write(params, grads[comm.rank])
        return f"loss {comm.rank}"

    with NAdam(params, comm=comm) as opt:
        assert opt.step(closure) == f"loss {comm.rank}"
        oracle.step(grads)
        assert_same(params, oracle)
        assert opt.step() is None


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e9])
def test_clipping_by_the_global_norm(comm, max_grad_norm):
    values = initial()
    params, oracle = make_params(values), Oracle(values)
    with NAdam(params, comm=comm, max_grad_norm=max_grad_norm) as opt:
        for step in range(3):
            grads = all_grads(step, comm)
            opt.zero_grad()
            write(params, grads[comm.rank])
            opt.step()
            report = opt.last_step
            assert report.grad_norm == pytest.approx(oracle.norm(grads), rel=1e-6)
            expected = min(1.0, max_grad_norm / (report.grad_norm + 1e-6))
            assert report.clip_factor == expected
            oracle.step(grads, factor=expected)
            assert_same(params, oracle)


def test_the_norm_does_not_depend_on_buckets_or_absent_gradients(comm):
    norms = []
    for bucket_nbytes in (1, 100_000, 32 << 20):
        params = make_params(initial())
        policy = ShardPolicy(bucket_nbytes=bucket_nbytes)
        with NAdam(params, comm=comm, max_grad_norm=1.0, policy=policy) as opt:
            write(params, all_grads(0, comm)[comm.rank])
            opt.step()
            opt.zero_grad()
            write(params, all_grads(1, comm)[comm.rank])
            params[3].grad = None  # what it held must not count
            opt.step()
            norms.append(opt.last_step.grad_norm)
    assert len(set(norms)) == 1
    grads = [list(rank) for rank in all_grads(1, comm)]
    for rank in grads:
        rank[3] = np.zeros_like(rank[3])
    assert norms[0] == pytest.approx(Oracle(initial()).norm(grads), rel=1e-6)


def test_added_groups_leave_the_others_alone(comm):
    values, later = initial(), initial(seed=5, shapes=[(7,), (5000,)])
    params, added = make_params(values), make_params(later)
    for param in added:
        param.name += "_later"
    oracle, oracle_added = Oracle(values), Oracle(later, lr=0.5)
    shapes = [value.shape for value in later]
    with NAdam(params, comm=comm) as opt:
        for step in range(6):
            if step == 3:
                opt.add_param_group({"params": added, "lr": 0.5})
            opt.zero_grad()
            grads = all_grads(step, comm)
            write(params, grads[comm.rank])
            oracle.step(grads)
            if step >= 3:
                more = all_grads(step + 100, comm, shapes=shapes)
                write(added, more[comm.rank])
                oracle_added.step(more)
            opt.step()
        assert_same(params, oracle)
        assert_same(added, oracle_added)
        assert [len(group["params"]) for group in opt.param_groups] == [len(SHAPES), 2]
        assert opt.partition.param_numel == sum(value.size for value in values + later)


def test_several_optimizers_on_parts_of_the_ranks(comm):
    half = comm.Split(comm.rank % 2)
    values = initial(seed=comm.rank % 2)
    params, oracle = make_params(values), Oracle(values)
    with NAdam(params, comm=half) as opt, NAdam(make_params(values), comm=comm) as whole:
        for step in range(3):
            grads = all_grads(step, half)
            write(params, grads[half.rank])
            opt.step()
            whole.step()
            oracle.step(grads)
        assert_same(params, oracle)
    half.Free()


def test_memory_report_counts_windows_and_moments(comm):
    params = [Parameter(np.zeros(4096 * 64, np.float32), "w")]
    with NAdam(params, comm=comm) as opt:
        report = opt.memory_report()
        numel = 4096 * 64
        assert report.node_nbytes == (4 + 4 * comm.size + 8) * numel
        assert report.rank_nbytes == report.node_nbytes // comm.size
        assert report.replicated_rank_nbytes == 16 * numel
        assert report.replicated_node_nbytes == 16 * numel * comm.size
        (entry,) = opt.state_dict()["state"].values()
        assert entry["exp_avg"].size == entry["exp_avg_sq"].size == numel


@pytest.mark.parametrize("max_grad_norm", [None, 1e9])
def test_a_gradient_missing_on_one_rank_stays_missing(comm, max_grad_norm):
    values = initial()
    params, oracle = make_params(values), Oracle(values)
    with NAdam(params, comm=comm, max_grad_norm=max_grad_norm) as opt:
        for step in range(4):
            grads = all_grads(step, comm)
            for rank in range(1, comm.size):
                grads[rank][4] = None
            opt.zero_grad(set_to_none=True)  # what a reduction left in the window stays there
            for param, grad in zip(params, grads[comm.rank], strict=True):
                param.grad = grad
            opt.step()
            oracle.step(grads)
        assert_same(params, oracle)


def test_many_small_parameters(comm):
    params = [Parameter(np.ones((), np.float32)) for _ in range(5_000)]
    with NAdam(params, comm=comm, lr=0.1) as opt:
        for param in params:
            param.grad[...] = 1.0
        opt.step()
        assert opt.state_dict()["state"][4_999]["step"] == 1
        assert len({float(param.data) for param in params}) == 1


def test_only_empty_parameters(comm):
    params = [Parameter(np.ones((0, 3), np.float32), "e")]
    with NAdam(params, comm=comm, max_grad_norm=1.0) as opt:
        opt.step()
        assert opt.last_step.grad_norm == 0


def test_hyperparameters_changed_in_place_are_seen(comm):
    values = initial()
    params, oracle = make_params(values), Oracle(values)
    lr, betas = np.array(0.1), [0.9, 0.99]
    with NAdam(params, comm=comm, lr=lr, betas=betas) as opt:
        for step in range(3):
            grads = all_grads(step, comm)
            write(params, grads[comm.rank])
            lr[...] = 0.1 / (1 + step)
            betas[0] = 0.5 + 0.1 * step
            opt.step()
            oracle.step(grads, lr=float(lr), betas=tuple(betas))
        assert_same(params, oracle)


def test_a_value_put_in_place_before_close_stays(comm):
    params = make_params(initial())
    best = np.full_like(params[0].data, 5.0)
    with NAdam(params, comm=comm):
        trained = params[1].data.copy()
        params[0].data = best
    assert params[0].data is best
    np.testing.assert_array_equal(params[1].data, trained)
