"""Whatever the nodes, the parameters are the same; ranks of one machine play several."""

import numpy as np
import pytest

from shardopt import ShardPolicy
from shardopt.layout.traffic import plan_traffic
from shardopt.numpy import NAdam, Parameter
from tests.support.nodes import (
    draw_grads,
    make_params,
    several_nodes,
    train,
    ways_to_share,
    ways_to_the_same_bits,
)

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize(
    ("dtype", "max_grad_norm"),
    [
        ("float32", None),
        ("bfloat16", None),
        ("float16", 1.0),
        ("float64", 1.0),
        *(
            pytest.param(dtype, norm, marks=pytest.mark.thorough)
            for dtype, norm in [
                ("float32", 1.0),
                ("bfloat16", 1.0),
                ("float16", None),
                ("float64", None),
            ]
        ),
    ],
)
def test_bits_do_not_depend_on_nodes_or_buckets(comm, dtype, max_grad_norm):
    seen = set()
    for share in ways_to_the_same_bits(comm):
        for bucket_nbytes in (1, 40_000, 1 << 25):
            bits, *_ = train(
                comm,
                share,
                20 if bucket_nbytes == 40_000 and dtype == "float32" else 5,
                dtype=dtype,
                max_grad_norm=max_grad_norm,
                bucket_nbytes=bucket_nbytes,
            )
            assert len(set(comm.allgather(bits))) == 1
            seen.add((len(bits), bucket_nbytes == 40_000 and dtype == "float32", bits))
    assert len(seen) == (2 if dtype == "float32" else 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("wire_dtype", [None, "bfloat16", "float16"])
def test_traffic_is_what_the_plan_says(comm, dtype, wire_dtype):
    for share in ways_to_share(comm):
        _, report, partition, place = train(
            comm, share, 2, dtype=dtype, wire_dtype=wire_dtype, bucket_nbytes=100_000
        )
        planned = plan_traffic(partition, *place, wire_dtype)
        assert (report.sent_nbytes, report.sent_messages) == planned
        itemsize = np.dtype(dtype).itemsize
        wire = 2 if wire_dtype else 4 if partition.node_size > 1 and itemsize == 2 else itemsize
        # Every node sends the others' shares of gradients, and its share of parameters to each.
        total = (wire + itemsize) * partition.numel * (partition.num_nodes - 1)
        assert comm.allreduce(report.sent_nbytes) == total


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16"])
def test_a_narrow_wire_rounds_what_a_node_sends(comm, wire_dtype):
    share = several_nodes(comm)[0]
    value = np.linspace(1.0, 2.0, 9000, dtype=np.float32)
    param = Parameter(np.zeros_like(value))
    policy = ShardPolicy(share_node=share, wire_dtype=wire_dtype, timeout_s=30)
    settings = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 1e9, "momentum_decay": 0.0}
    with NAdam([param], comm=comm, policy=policy, variant="optax", **settings) as opt:
        param.grad = value * (comm.rank + 1)
        opt.step()
        topology = opt.core.topology
        sums = np.zeros_like(value)
        for node in range(topology.num_nodes):
            ranks = [r for r, place in enumerate(topology.places) if place[0] == node]
            sums += sum(value * (r + 1) for r in ranks).astype(wire_dtype).astype(np.float32)
        np.testing.assert_allclose(param.data, -sums / comm.size / 1e9, rtol=1e-6)


def test_values_from_any_rank_reach_every_node(comm):
    for share in several_nodes(comm):
        params = make_params()
        for param in params:
            param.data += comm.rank  # rank 0's win
        with NAdam(params, comm=comm, policy=ShardPolicy(share_node=share, timeout_s=30)) as opt:
            for param, original in zip(params, make_params(), strict=True):
                np.testing.assert_array_equal(param.data, original.data)
            opt.zero_grad()
            if comm.rank > 0:  # the lowest of those that replace a value wins
                params[0].data = np.full_like(params[0].data, comm.rank)
            if comm.rank == comm.size - 1:
                params[3].data = np.full_like(params[3].data, -7)
            opt.step()
            moved = [comm.bcast(params[i].data.copy()) for i in (0, 3)]
            np.testing.assert_array_equal(params[0].data, moved[0])
            np.testing.assert_array_equal(params[3].data, moved[1])
            np.testing.assert_allclose(params[0].data, 1, atol=0.1)
            np.testing.assert_allclose(params[3].data, -7, atol=0.1)


def test_groups_can_be_added_later(comm):
    results = []
    for share in ways_to_the_same_bits(comm):
        params = make_params()
        policy = ShardPolicy(share_node=share, timeout_s=30, bucket_nbytes=50_000)
        with NAdam(params[:2], comm=comm, policy=policy) as opt:
            for step in range(4):
                if step == 2:
                    opt.add_param_group({"params": params[2:], "lr": 0.1})
                opt.zero_grad()
                draw_grads(params, step, comm.rank)
                opt.step()
        results.append([param.data.tobytes() for param in params])
    assert all(result == results[0] for result in results)


@pytest.mark.filterwarnings("ignore::shardopt.errors.NonFiniteWarning")
def test_steps_with_inf_are_skipped_on_all_nodes(comm):
    for share in several_nodes(comm):
        params = make_params()
        policy = ShardPolicy(share_node=share, timeout_s=30, check_finite=True)
        with NAdam(params, comm=comm, policy=policy) as opt:
            for step in range(3):
                before = [param.data.copy() for param in params]
                opt.zero_grad()
                draw_grads(params, step, comm.rank)
                if step == 1 and comm.rank == comm.size - 1:
                    params[3].grad[5, 5] = np.inf
                opt.step()
                assert opt.last_step.skipped == (step == 1)
                same = [np.array_equal(p.data, b) for p, b in zip(params, before, strict=True)]
                assert all(same) if step == 1 else not any(same[:2])


@pytest.mark.mpi(min_size=3)
def test_several_optimizers_on_parts_of_the_ranks(comm):
    half = comm.Split(comm.rank % 2, comm.rank)
    params, others = make_params(), make_params()
    policy = ShardPolicy(share_node=False, timeout_s=30)
    with (
        NAdam(params, comm=half, policy=policy) as opt,
        NAdam(others, comm=comm, policy=policy) as all_opt,
    ):
        for step in range(3):
            for optimizer, mine, rank in ((opt, params, half.rank), (all_opt, others, comm.rank)):
                optimizer.zero_grad()
                draw_grads(mine, step, rank)
                optimizer.step()
        assert opt.core.topology.num_nodes == half.size
        assert all_opt.core.topology.num_nodes == comm.size
    alone, *_ = train(half, False, 3)
    together, *_ = train(comm, False, 3)
    half.Free()
    assert len(set(comm.allgather(together))) == 1
    assert alone


@pytest.mark.parametrize("wire_dtype", [None, "bfloat16"])
def test_memory_is_what_the_plan_says(comm, wire_dtype):
    share = several_nodes(comm)[0]
    shapes = [(4096 * 8 * comm.size,)]  # all shards alike
    policy = ShardPolicy(share_node=share, wire_dtype=wire_dtype, timeout_s=30)
    with NAdam(make_params(shapes=shapes), comm=comm, policy=policy) as opt:
        parts = opt.core.parts
        sums_nbytes = sum(buffers.sums.arrays["sum"].nbytes for buffers in parts.memory.buffers)
        staging_nbytes = parts.sync.reduction.staging_nbytes
        staging_of_node = opt.core.topology.node_comm.allreduce(staging_nbytes)
        assert opt.memory_report().travel_node_nbytes == sums_nbytes + staging_of_node


def test_loss_scales_that_differ_send_nothing_twice(comm):
    for share in several_nodes(comm):
        params = make_params()
        policy = ShardPolicy(share_node=share, timeout_s=30)
        with NAdam(params, lr=0.01, comm=comm, policy=policy) as opt:
            draw_grads(params, 0, comm.rank)
            for param in params:
                param.grad = param.grad * 2**comm.rank
            opt.step(loss_scale=2.0**comm.rank)
            place = opt.core.topology.places[comm.rank]
            planned = plan_traffic(opt.partition, *place)
            report = opt.last_step
        expected, *_ = train(comm, share, 1)
        assert b"".join(param.data.tobytes() for param in params) == expected
        assert (report.sent_nbytes, report.sent_messages) == planned
