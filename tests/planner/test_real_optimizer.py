"""Plans against a real optimizer on as many ranks: memory, bytes, messages, checkpoints."""

import os

import numpy as np
import pytest

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.checkpoint import save
from shardopt.layout.ring import ring_bucket_nbytes
from shardopt.planner.estimate import Layout, estimate
from shardopt.planner.machine import make_machine
from shardopt.planner.model import evenly
from shardopt.planner.saving import plan_saves
from tests.support.nodes import ways_to_share

pytestmark = pytest.mark.mpi

MACHINE = make_machine({"memory_nbytes_per_s": 1e11, "link_nbytes_per_s": 1e9}, {}, None, 2)
NUMEL = 3 << 18


def train(model, comm, **settings):
    """Take two steps with the parameters of a model, and return the optimizer."""
    params = [Parameter(np.ones(s.shape, np.dtype(s.dtype)), name=s.name) for s in model.specs]
    opt = NAdam(params, comm=comm, **settings)
    for _ in range(2):
        opt.zero_grad()
        for param in params:
            param.grad[...] = 1
        opt.step()
    return opt


def node_nbytes(opt, comm):
    """The memory that training has touched on this rank's node, staging buffers included."""
    comm.Barrier()
    parts, node_comm = opt.core.parts, opt.core.topology.node_comm
    nbytes = os.fstat(parts.memory.arena.fd).st_blocks * 512
    staging_nbytes = getattr(parts.sync.reduction, "staging_nbytes", 0)
    return nbytes + node_comm.allreduce(staging_nbytes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("clips", [False, True])
def test_memory_of_a_node(comm, dtype, clips):
    model = evenly(NUMEL, dtype, 3)
    norm = 1.0 if clips else None
    for share in ways_to_share(comm):
        group = comm.Dup()  # whose optimizer has an arena of its own
        policy = ShardPolicy(share_node=share, timeout_s=30)
        with train(model, group, policy=policy, max_grad_norm=norm) as opt:
            topology = opt.core.topology
            layout = Layout(topology.num_nodes, topology.node_size, clips=clips)
            planned = estimate(model, layout, MACHINE)
            assert planned.node_share == pytest.approx(1, rel=0.02)
            assert planned.memory == opt.memory_report()
            assert node_nbytes(opt, group) == pytest.approx(planned.memory.node_nbytes, rel=0.02)
        group.Free()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wire_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("bucket_nbytes", [None, 100_000])
def test_bytes_and_messages(comm, dtype, wire_dtype, bucket_nbytes):
    model = evenly(300_007, dtype, 5)
    for share in ways_to_share(comm):
        policy = ShardPolicy(
            share_node=share, wire_dtype=wire_dtype, bucket_nbytes=bucket_nbytes, timeout_s=30
        )
        with train(model, comm, policy=policy) as opt:
            topology, report = opt.core.topology, opt.last_step
            ranks = comm.allgather((topology.node, report.sent_nbytes, report.sent_messages))
        layout = Layout(topology.num_nodes, topology.node_size, policy)
        planned = estimate(model, layout, MACHINE)
        assert planned.rank_traffic == max(tuple(sent) for _, *sent in ranks)
        nodes = [
            [sent for node, *sent in ranks if node == number]
            for number in range(topology.num_nodes)
        ]
        sums = [tuple(map(sum, zip(*node, strict=True))) for node in nodes]
        assert planned.node_traffic == max(sums)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_size_of_a_checkpoint(comm, mpi_tmp_path, dtype):
    model = evenly(NUMEL, dtype, 3)
    with train(model, comm, policy=ShardPolicy(timeout_s=30)) as opt:
        save(mpi_tmp_path / "saved", opt)
    comm.Barrier()
    found = sum(path.stat().st_size for path in (mpi_tmp_path / "saved").rglob("*"))
    planned = plan_saves(model, Layout(1, comm.size), MACHINE).nbytes
    assert found == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("ring_nbytes", [None, 1 << 20])
def test_memory_of_stage_two(comm, ring_nbytes):
    """Beside rows and ring, ranks keep no more than the late gradients that are planned."""
    torch = pytest.importorskip("torch")
    face = pytest.importorskip("shardopt.torch")
    model = evenly(4 * NUMEL, "float32", 3)
    policy = ShardPolicy(stage=2, ring_nbytes=ring_nbytes, timeout_s=30)
    layout = Layout(1, comm.size, policy)
    planned = estimate(model, layout, MACHINE).memory
    params = [torch.nn.Parameter(torch.ones(spec.shape)) for spec in model.specs]
    group = comm.Dup()
    with face.NAdam(params, comm=group, policy=policy) as opt:
        for _ in range(3):
            sum(param.square().sum() for param in params).backward()
            opt.step()
            opt.zero_grad()
        assert planned == opt.memory_report()
        assert (opt.last_step.sent_nbytes, opt.last_step.sent_messages) == (0, 0)
        shared_nbytes = planned.node_nbytes - planned.late_node_nbytes
        assert node_nbytes(opt, group) == pytest.approx(shared_nbytes, rel=0.02)
    group.Free()
    assert shared_nbytes - planned.ring_node_nbytes == pytest.approx(16 * 4 * NUMEL, rel=0.01)
    limit = ring_nbytes or max(16 << 20, 0.05 * 16 * NUMEL)
    least = 2 * comm.size * ring_bucket_nbytes(1, comm.size)  # two buffers for each rank
    assert planned.ring_node_nbytes <= 1.02 * max(limit, least)
    assert planned.late_node_nbytes == comm.size * 4 * NUMEL // 3 * 4
