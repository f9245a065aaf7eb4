"""close() gives everything back: memory, gradients, hooks and references."""

import gc
import os
import threading
import weakref

import pytest

pytest.importorskip("torch")

import torch

from shardopt import ShardPolicy
from shardopt.torch import NAdam
from tests.support.errors import POLICY
from tests.support.torch_models import Twins, loss_of, make_model, params_of

pytestmark = pytest.mark.mpi


def test_close_takes_everything_back(comm):
    with Twins(comm, lr=0.1) as twins:
        twins.step()
        addresses = [param.data_ptr() for param in params_of(twins.opt)]
    for param, address in zip(params_of(twins.opt), addresses, strict=True):
        assert param.grad is None
        assert not param._post_accumulate_grad_hooks
        assert param.data_ptr() == address  # nothing is copied
    twins.assert_same()
    plain = torch.optim.NAdam(twins.ours.parameters(), lr=0.1)  # a model like any other
    loss_of(twins.ours, 0, 0).backward()
    plain.step()
    with NAdam(twins.ours.parameters(), comm=comm, policy=POLICY) as again:
        loss_of(twins.ours, 0, 0).backward()
        again.step()
        assert again.last_step.num_updated == 6


def test_nothing_is_left_of_a_closed_optimizer(comm):
    model = make_model()
    opt = NAdam(model.parameters(), comm=comm, policy=POLICY)
    loss_of(model, 0, comm.rank).backward()
    opt.step()
    opt.close()
    left = [weakref.ref(opt), weakref.ref(opt.core), *map(weakref.ref, model.parameters())]
    del opt, model
    gc.collect()
    assert [ref for ref in left if ref() is not None] == []


def test_a_view_that_is_still_held_stays_readable(comm):
    with Twins(comm, lr=0.1) as twins:
        twins.step()
        held = twins.ours[0].weight.data, twins.ours[0].weight.grad
        values = [tensor.clone() for tensor in held]
    with Twins(comm):
        pass  # would take the addresses if they had been given up
    assert all(map(torch.equal, held, values))


def test_close_gives_back_all_but_the_parameters(comm):
    group = comm.Dup()  # an arena of its own
    param = torch.nn.Parameter(torch.ones(1 << 20, dtype=torch.float32))
    opt = NAdam([param], comm=group, max_grad_norm=1.0)
    param.sum().backward()
    opt.step()
    fd = os.dup(opt.core.parts.memory.arena.fd)
    group.Barrier()
    assert os.fstat(fd).st_blocks * 512 >= (12 + 4 * comm.size) << 20
    group.Barrier()
    opt.close()
    assert 4 << 20 <= os.fstat(fd).st_blocks * 512 < 5 << 20
    os.close(fd)
    group.Free()


@pytest.mark.parametrize("share", [True, False])
def test_optimizers_that_are_dropped_give_back_memory_and_threads(comm, share):
    group, threads, taken = comm.Dup(), [], []
    for _ in range(6):
        model = torch.nn.Linear(500, 500)
        opt = NAdam(model.parameters(), comm=group, policy=ShardPolicy(share_node=share))
        arena = opt.core.parts.memory.arena
        model(torch.ones(1, 500)).sum().backward()
        opt.step()
        del model, opt
        gc.collect()
        group.Barrier()
        arena.reclaim()
        taken.append(os.fstat(arena.fd).st_blocks)
        threads.append(threading.active_count())
        group.Barrier()
    assert len(set(taken)) == 1
    assert threads[-1] == threads[0]
    group.Free()
