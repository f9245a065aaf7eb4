"""``average_grads()`` with arrays: the bits of a step, on any nodes."""

import numpy as np
import pytest

from shardopt import ShardPolicy
from shardopt.errors import HyperparamsError
from shardopt.numpy import NAdam, Parameter
from tests.support.errors import BOTH_WAYS, POLICY, assert_steps, errs, make_optimizer, refused
from tests.support.errors import params_of as params_in
from tests.support.nodes import draw_grads, make_params, several_nodes, ways_to_share

pytestmark = pytest.mark.mpi


def train(comm, share, *, averages, dtype="float32", num_steps=2, **settings):
    """Train on random gradients, of which the second parameter has none."""
    params = make_params(dtype)
    policy = ShardPolicy(share_node=share, bucket_nbytes=100_000, timeout_s=30)
    with NAdam(params, lr=0.01, comm=comm, policy=policy, **settings) as opt:
        for step in range(num_steps):
            opt.zero_grad()
            draw_grads(params, step, comm.rank)
            params[1].grad = None
            if averages:
                opt.average_grads()
                assert params[1].grad is None
            opt.step()
        assert opt.last_step.num_updated == len(params) - 1
    bits = [param.data.tobytes() for param in params]
    assert comm.allgather(bits) == [bits] * comm.size
    return params


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_step_after_it_has_the_same_bits(comm, dtype):
    for share in ways_to_share(comm):
        with_it = train(comm, share, averages=True, dtype=dtype)
        without = train(comm, share, averages=False, dtype=dtype)
        for one, other in zip(with_it, without, strict=True):
            assert one.data.tobytes() == other.data.tobytes()


def test_after_clipping_the_last_bits_may_differ(comm):
    """The factor of clipping is rounded by itself."""
    for share in ways_to_share(comm):
        with_it = train(comm, share, averages=True, max_grad_norm=1.0, eps=1e-3)
        without = train(comm, share, averages=False, max_grad_norm=1.0, eps=1e-3)
        for one, other in zip(with_it, without, strict=True):
            np.testing.assert_allclose(one.data, other.data, rtol=1e-5, atol=1e-7)


def tree_sum(arrays):
    """The sum in the order of the kernel: ((0+1)+(2+3))+(4+5)."""
    while len(arrays) > 1:
        arrays = [sum(arrays[i + 1 : i + 2], arrays[i]) for i in range(0, len(arrays), 2)]
    return arrays[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradients_are_the_rounded_average(comm, dtype):
    for share in ways_to_share(comm):
        params, expected = make_params(dtype), make_params(dtype)
        policy = ShardPolicy(share_node=share, bucket_nbytes=100_000, timeout_s=30)
        with NAdam(params, comm=comm, policy=policy) as opt:
            for scale in (1.0, 8.0):
                opt.zero_grad()
                draw_grads(params, 0, comm.rank)
                opt.average_grads(loss_scale=scale)
                grads = []
                for rank in range(comm.size):
                    draw_grads(expected, 0, rank)
                    grads.append([param.grad.astype(np.float32) for param in expected])
                for param, *ranks in zip(params, *grads, strict=True):
                    average = tree_sum(ranks) * np.float32(1 / comm.size / scale)
                    assert param.grad.tobytes() == average.astype(dtype).tobytes()
                opt.step()


@pytest.mark.mpi(min_size=2)
def test_what_is_averaged_is_sent_once_more(comm):
    for share in several_nodes(comm):
        params = make_params()
        policy = ShardPolicy(share_node=share, timeout_s=30)
        with NAdam(params, comm=comm, policy=policy) as opt:
            sent = []
            for averages in (False, True):
                opt.zero_grad()
                draw_grads(params, 0, comm.rank)
                if averages:
                    opt.average_grads()
                opt.step()
                sent.append(comm.allreduce(opt.last_step.sent_nbytes))
            others = opt.core.topology.num_nodes - 1
            nbytes = sum(region.numel for region in opt.partition.regions) * 4
            assert sent[1] - sent[0] == others * nbytes


def test_gradients_of_frozen_parameters_stay_out_of_memory(comm):
    frozen, trained = Parameter(np.ones(100_000)), Parameter(np.ones(9000))
    with NAdam([frozen, trained], comm=comm, policy=POLICY) as opt:
        frozen.grad = None
        trained.grad += comm.rank
        opt.average_grads()
        assert frozen.grad is None
        assert (trained.grad == (comm.size - 1) / 2).all()
        opt.step()
        assert opt.last_step.num_updated == 1


@BOTH_WAYS
@pytest.mark.parametrize("scale", [0.0, np.nan, "many"])
def test_a_loss_scale_must_be_a_positive_number(comm, scale, alone):
    with make_optimizer(comm) as opt:
        for param in params_in(opt):
            param.grad += 1.0
        with refused(comm, HyperparamsError, "loss_scale must be", alone=alone):
            opt.average_grads(scale if errs(comm, alone) else 1.0)
        opt.average_grads()
        assert_steps(opt)
