"""Sums of 16-bit gradients, kept for the update where their norm is measured before it."""

import gc
import os
import weakref

import numpy as np
import pytest

from shardopt import NAdam, ShardPolicy
from tests.support.oracle import Oracle, all_grads, assert_same, initial, make_params, write

pytestmark = pytest.mark.mpi

NUMEL = 1 << 20
SIXTEEN = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def file_nbytes(opt, comm):
    """The memory of the node that training has touched so far."""
    comm.Barrier()
    nbytes = os.fstat(opt.core.parts.memory.arena.fd).st_blocks * 512
    comm.Barrier()
    return nbytes


def take_step(opt, params):
    for param in params:
        param.grad[...] = 1
    opt.step()


@pytest.fixture
def group(comm):
    """Ranks whose optimizers have an arena of their own."""
    group = comm.Dup()
    yield group
    group.Free()


@SIXTEEN
def test_memory_is_what_the_report_says_before_and_after_clipping(group, dtype):
    params = make_params([np.ones(NUMEL, dtype), np.ones(NUMEL, dtype)])
    with NAdam(params, comm=group) as opt:
        found = []
        for max_grad_norm in (None, 1.0):
            opt.max_grad_norm = max_grad_norm
            take_step(opt, params)
            found.append((opt.memory_report().node_nbytes, file_nbytes(opt, group)))
        for report, taken in found:
            assert taken == pytest.approx(report, rel=0.02)
        summed = found[1][0] - found[0][0]
        assert summed == (8 * NUMEL if dtype == "bfloat16" and group.size > 1 else 0)
        opt.param_groups[0]["params"].pop()
        take_step(opt, params[:1])
        assert file_nbytes(opt, group) == pytest.approx(opt.memory_report().node_nbytes, rel=0.02)


@SIXTEEN
def test_parameters_without_gradients_have_no_sums(group, dtype):
    params = make_params([np.ones(NUMEL, dtype), np.ones(NUMEL, dtype)])
    with NAdam(params, comm=group, max_grad_norm=1.0) as opt:
        for _ in range(2):
            opt.zero_grad(set_to_none=True)
            params[1].grad = np.ones(NUMEL, dtype)
            opt.step()
        nbytes = 2 * (2 + 2 * group.size) + 12 + (4 if group.size > 1 else 0)
        assert file_nbytes(opt, group) == pytest.approx(nbytes * NUMEL, rel=0.02)


@SIXTEEN
def test_the_update_reads_the_gradients_of_all_ranks_at_most_once(comm, dtype, monkeypatch):
    params = make_params(initial(dtype=dtype))
    with NAdam(params, comm=comm, policy=ShardPolicy(check_finite=False)) as opt:
        kernel, seen = opt.core.parts.backend.kernel, []
        update, reduce = kernel.update, kernel.reduce
        monkeypatch.setattr(
            kernel, "update", lambda *args: seen.append(("update", len(args[0]))) or update(*args)
        )
        monkeypatch.setattr(
            kernel, "reduce", lambda *args: seen.append(("reduce", len(args[0]))) or reduce(*args)
        )
        for max_grad_norm, averages, expected in [
            (None, False, {("update", comm.size)}),
            (1.0, False, {("reduce", comm.size), ("update", 1)}),
            (1.0, True, {("reduce", comm.size), ("reduce", 1), ("update", 1)}),
        ]:
            opt.max_grad_norm = max_grad_norm
            opt.zero_grad()
            write(params, all_grads(0, comm, dtype)[comm.rank])
            mine = any(map(any, (buffers.shards for buffers in opt.core.parts.memory.buffers)))
            seen.clear()
            if averages:
                opt.average_grads()
            opt.step()
            assert set(seen) == (expected if mine else set())


@SIXTEEN
@pytest.mark.parametrize("share", [True, False])
def test_bits_hold_when_groups_are_edited(comm, dtype, share):
    values = initial(dtype=dtype)
    params, oracle = make_params(values), Oracle(values)
    policy = ShardPolicy(share_node=share, bucket_nbytes=40_000, timeout_s=30)
    with NAdam(params[:7], comm=comm, max_grad_norm=1.0, policy=policy) as opt:
        used = list(range(7))
        for step in range(6):
            if step == 2:
                del opt.param_groups[0]["params"][3:5]
                used = [0, 1, 2, 5, 6]
            if step == 4:
                opt.add_param_group({"params": params[7:]})
                used += [7, 8]
            grads = [
                [grad if i in used else None for i, grad in enumerate(mine)]
                for mine in all_grads(step, comm, dtype)
            ]
            opt.zero_grad()
            for index in used:
                params[index].grad[...] = grads[comm.rank][index]
            opt.step()
            assert opt.last_step.clip_factor < 1
            oracle.step(grads, factor=opt.last_step.clip_factor)
        for index in used:
            np.testing.assert_array_equal(params[index].data, oracle.params[index])


@SIXTEEN
def test_closing_releases_the_sums(comm, dtype):
    params = make_params(initial(dtype=dtype))
    opt = NAdam(params, comm=comm, max_grad_norm=1.0)
    write(params, all_grads(0, comm, dtype)[comm.rank])
    opt.step()
    (buffers,) = opt.core.parts.memory.buffers
    assert (buffers.sums is None) == (comm.size == 1)
    held = None if buffers.sums is None else weakref.ref(buffers.sums.arrays["sum"].base)
    del buffers
    opt.close()
    gc.collect()
    assert held is None or held() is None


@SIXTEEN
def test_a_skipped_step_leaves_no_sums_to_the_next(comm, dtype):
    values = initial(dtype=dtype)
    params, oracle = make_params(values), Oracle(values)
    with NAdam(params, comm=comm, max_grad_norm=1.0) as opt:
        opt.step(overflowed=True)
        for max_grad_norm in (1.0, None):
            opt.max_grad_norm = max_grad_norm
            opt.zero_grad()
            grads = all_grads(int(max_grad_norm or 0), comm, dtype)
            write(params, grads[comm.rank])
            opt.step()
            oracle.step(grads, factor=opt.last_step.clip_factor)
            assert_same(params, oracle)
