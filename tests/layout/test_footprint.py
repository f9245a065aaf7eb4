"""Memory per parameter by formula, on CPUs, on GPUs and with moments in the node's memory."""

import pytest

from shardopt.layout.footprint import plan_memory
from shardopt.layout.partition import ParamSpec, plan_partition
from shardopt.layout.traffic import NUM_STAGING_BUFFERS, plan_staging_buffer

NUMEL = 1 << 20  # whole buckets on any number of ranks below, so that nothing is rounded
SIXTEEN = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
RANKS = pytest.mark.parametrize("ranks", [1, 2, 8])


def plan(dtype, nodes, ranks, placement, **settings):
    specs = [ParamSpec(f"p{i}", (NUMEL // 2,), dtype, 0) for i in range(2)]
    partition = plan_partition(specs, nodes, ranks, 1 << 20)
    staging = [
        plan_staging_buffer(partition, nodes - 1, lane, None, from_device=placement == "cuda")
        for lane in range(ranks)
    ]
    buffers_nbytes = NUM_STAGING_BUFFERS * sum(map(sum, staging)) if nodes > 1 else 0
    return plan_memory(partition, placement=placement, **settings), buffers_nbytes


@RANKS
def test_float32_on_one_node_of_gpus(ranks):
    report, _ = plan("float32", 1, ranks, "cuda")
    assert report.device_rank_nbytes == (4 + 4) * NUMEL + 8 * NUMEL // ranks
    assert report.node_nbytes == ranks * report.device_rank_nbytes
    assert report.rank_nbytes == report.device_rank_nbytes
    assert report.replicated_rank_nbytes == (4 + 4 + 8) * NUMEL
    assert report.written_node_nbytes == 0


@SIXTEEN
@RANKS
def test_sixteen_bits_on_one_node_of_gpus(dtype, ranks):
    report, _ = plan(dtype, 1, ranks, "cuda")
    assert report.device_rank_nbytes == (2 + 2) * NUMEL + 12 * NUMEL // ranks


@pytest.mark.parametrize(("ranks", "sums"), [(1, 0), (2, 4), (8, 4)])
@SIXTEEN
def test_sums_of_sixteen_bits_that_are_measured_first(dtype, ranks, sums):
    report, _ = plan(dtype, 1, ranks, "cuda", needs_norm=True)
    assert report.device_rank_nbytes == (2 + 2) * NUMEL + (12 + sums) * NUMEL // ranks
    assert report.node_nbytes == ranks * report.device_rank_nbytes
    report, _ = plan("float32", 1, ranks, "cuda", needs_norm=True)
    assert report.device_rank_nbytes == (4 + 4) * NUMEL + 8 * NUMEL // ranks


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(("dtype", "sharded"), [("float32", 8 + 4), ("bfloat16", 12 + 4)])
def test_several_nodes_of_gpus(dtype, sharded, ranks):
    """Sums of gradients are on the GPU; the buffers of messages are in the host's memory.

    Those of a single rank, too, which CPUs send from where they are.
    """
    size = 4 if dtype == "float32" else 2
    report, buffers_nbytes = plan(dtype, 2, ranks, "cuda")
    assert report.device_rank_nbytes == 2 * size * NUMEL + sharded * NUMEL // (2 * ranks)
    assert buffers_nbytes > (plan(dtype, 2, ranks, "cpu")[1] if ranks == 1 else 0)
    assert report.node_nbytes == ranks * report.device_rank_nbytes + buffers_nbytes


@pytest.mark.parametrize(("dtype", "size", "state"), [("float32", 4, 8), ("bfloat16", 2, 12)])
@RANKS
def test_offload(dtype, size, state, ranks):
    """The host has what a node of CPUs has; each GPU has parameters and gradients beside that."""
    report, _ = plan(dtype, 1, ranks, "offload")
    assert report.device_rank_nbytes == 2 * size * NUMEL
    assert report.node_nbytes == (size + ranks * size + state) * NUMEL
    cpu, _ = plan(dtype, 1, ranks, "cpu")
    assert (report.node_nbytes, cpu.device_rank_nbytes) == (cpu.node_nbytes, 0)
    assert (report.written_node_nbytes, cpu.written_node_nbytes) == (0, ranks * size * NUMEL)


def test_frozen_parameters_have_neither_gradients_nor_moments():
    report, _ = plan("float32", 1, 2, "cuda", trained=[True, False])
    assert report.device_rank_nbytes == 4 * NUMEL + (4 + 8 // 2) * NUMEL // 2
