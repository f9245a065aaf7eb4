"""Estimates, peers and checkpoints against formulas that are written out here."""

import math
from dataclasses import replace

import numpy as np
import pytest

from shardopt.layout.partition import plan_partition
from shardopt.layout.state_spec import StateForm
from shardopt.layout.traffic import plan_traffic
from shardopt.planner.estimate import Layout, estimate, merged
from shardopt.planner.machine import GPUS, make_machine
from shardopt.planner.model import Model, evenly
from shardopt.planner.peers import plan_peers
from shardopt.planner.saving import daly_interval, plan_saves, young_interval
from shardopt.planner.simulate import NodeKind
from shardopt.policy import ShardPolicy

SPEEDS = {"memory_nbytes_per_s": 400e9, "link_nbytes_per_s": 25e9, "disk_nbytes_per_s": 2e9}
MACHINE = make_machine(SPEEDS, {}, None, 16)
MODEL = evenly(1 << 26, "bfloat16", 64)
LAYOUT = Layout(4, 2)


def test_traffic_is_that_of_the_partition():
    found = estimate(MODEL, LAYOUT, MACHINE)
    partition = plan_partition(MODEL.specs, 4, 2, LAYOUT.bucket)
    ranks = [plan_traffic(partition, 3, lane) for lane in (0, 1)]
    assert found.node_traffic.nbytes == sum(rank.nbytes for rank in ranks)
    assert found.node_traffic.messages == sum(rank.messages for rank in ranks)
    assert found.rank_traffic in ranks
    assert found.num_buckets == len(partition.buckets)


def test_a_step_lies_between_its_longest_phase_and_all_of_them():
    found = estimate(MODEL, LAYOUT, MACHINE)
    assert max(found.phases) <= found.simulated.step_s <= sum(found.phases)
    assert found.band_s is None
    far = estimate(MODEL, replace(LAYOUT, num_nodes=16), MACHINE)
    low, high = far.band_s
    assert low < far.simulated.step_s < high


def test_a_phase_alone_takes_its_own_work_only():
    """An update moves memory; that messages cost something is told where they are sent."""
    found, dear = (
        estimate(MODEL, LAYOUT, replace(MACHINE, latency_s=0.0, message_s=message_s)).phases
        for message_s in (0.0, 1e-2)
    )
    own_numel = MODEL.numel // LAYOUT.num_nodes
    moved_nbytes = (4 + 2 * (2 + 4 + 4 + 4)) * own_numel  # sum; parameter, moments and master
    assert found.update_s == pytest.approx(moved_nbytes / 400e9, rel=1e-2)
    assert dear.update_s == found.update_s
    messages = estimate(MODEL, LAYOUT, MACHINE).rank_traffic.messages
    assert dear.all_gather_s == pytest.approx(1e-2 * messages / 2)
    sent_nbytes = 2 * MODEL.numel * 3 / 4
    assert found.all_gather_s == pytest.approx(sent_nbytes / 25e9, rel=1e-2)
    assert found.reduce_scatter_s == pytest.approx(2 * sent_nbytes / 25e9, rel=1e-2)


def test_a_long_backward_hides_the_exchange_of_gradients_but_for_the_last_bucket():
    layout = replace(LAYOUT, backward_s=10.0)
    found = estimate(MODEL, layout, MACHINE)
    left_s = found.simulated.step_s - found.hidden_s
    assert found.hidden_s > 0.8 * found.phases.reduce_scatter_s
    assert left_s >= found.phases.all_gather_s
    assert estimate(MODEL, replace(layout, num_nodes=1), MACHINE).hidden_s == 0


def test_backward_hides_nothing_of_gradients_that_nobody_reports():
    layout = replace(LAYOUT, backward_s=10.0)
    assert estimate(replace(MODEL, framework="torch"), layout, MACHINE).hidden_s > 0
    assert estimate(replace(MODEL, framework="jax"), layout, MACHINE).hidden_s == 0
    for placement in ("cuda", "offload"):
        gpus = replace(MACHINE, gpu=GPUS["h100"])
        assert estimate(MODEL, replace(layout, placement=placement), gpus).hidden_s == 0


def test_a_slow_node_makes_all_wait():
    slow = replace(LAYOUT, slow_share=0.5, slowdown=100.0)
    assert len(slow.kinds) == 3
    assert replace(slow, num_nodes=1, slow_share=0.1).kinds == LAYOUT.kinds == (NodeKind(),)
    assert estimate(MODEL, slow, MACHINE).simulated.step_s > 2 * (
        estimate(MODEL, LAYOUT, MACHINE).simulated.step_s
    )


def test_stage_two_reads_one_row_in_the_step_and_averages_in_backward():
    one, two = Layout(1, 4), Layout(1, 4, ShardPolicy(stage=2))
    model = evenly(1 << 26, "float32", 64)
    rows, row = (estimate(model, layout, MACHINE) for layout in (one, two))
    assert row.stage == 2
    assert row.memory.grads_node_nbytes == 4 * model.numel == rows.memory.grads_node_nbytes // 4
    assert row.memory.late_node_nbytes == 4 * 4 * model.numel // 64
    assert two.bucket == 1 << 20
    assert rows.phases.update_s == pytest.approx((4 * 4 + 24) * model.numel / 400e9)
    assert row.phases.update_s == pytest.approx((4 + 24) * model.numel / 400e9)
    assert row.averaging_s == pytest.approx(9 * 4 * model.numel / 400e9)
    assert rows.averaging_s == 0
    assert row.node_traffic == (0, 0)


def test_stage_two_exchanges_in_backward_and_updates_when_all_has_arrived():
    model = evenly(1 << 26, "float32", 64)
    rows = Layout(4, 2, ShardPolicy(bucket_nbytes=8 << 20))
    row = replace(rows, policy=replace(rows.policy, stage=2))
    one, two = (estimate(model, layout, MACHINE) for layout in (rows, row))
    assert two.node_traffic == one.node_traffic
    assert two.simulated.step_s > one.simulated.step_s
    assert two.averaging_s == 0
    assert two.phases.update_s == one.phases.update_s
    busy = replace(MACHINE, link_nbytes_per_s=1e15, latency_s=0, message_s=0)
    moved = [estimate(model, layout, busy).phases.reduce_scatter_s for layout in (rows, row)]
    assert moved[1] - moved[0] == pytest.approx(2 * 4 * model.numel / 400e9)  # into the ring
    behind = replace(row, backward_s=10.0)
    left = estimate(model, behind, MACHINE)
    exchange_s = left.phases.reduce_scatter_s
    assert left.hidden_s == pytest.approx(exchange_s, rel=0.1)
    by_node = replace(behind, policy=replace(row.policy, accumulate="node"))
    sums = estimate(model, by_node, MACHINE)
    assert sums.hidden_s == 0  # nothing is sent before the step
    assert sums.averaging_s == pytest.approx((2 * 2 + 1) * 4 * model.numel / 400e9)
    assert sums.memory.grads_node_nbytes == 4 * model.numel
    late = replace(rows, backward_s=10.0, policy=replace(rows.policy, overlap=False))
    assert estimate(model, late, MACHINE).hidden_s == 0


def test_updates_in_backward_leave_nothing_for_the_step():
    policy = ShardPolicy(stage=2, update_in_backward=True)
    model = evenly(1 << 26, "bfloat16", 64)
    found = estimate(model, Layout(1, 4, policy), MACHINE)
    assert found.memory.grads_node_nbytes == 0
    assert found.simulated.step_s == found.phases.consensus_s
    moved_nbytes = (2 * 4 * 2 + 2 * (2 + 4 + 4 + 4)) * model.numel  # ring; parameters and state
    assert found.averaging_s == pytest.approx(moved_nbytes / 400e9)
    in_step = estimate(model, Layout(1, 4, ShardPolicy(stage=2)), MACHINE)
    assert in_step.phases.update_s == pytest.approx((4 + 28) * model.numel / 400e9)


def test_updates_in_backward_on_nodes_keep_no_sums_and_need_not_wait_for_the_last():
    averaged, updated = (
        estimate(
            MODEL, replace(LAYOUT, policy=ShardPolicy(stage=2, update_in_backward=on)), MACHINE
        )
        for on in (False, True)
    )
    sums_nbytes = averaged.memory.travel_node_nbytes - updated.memory.travel_node_nbytes
    assert sums_nbytes == pytest.approx(4 * MODEL.numel / LAYOUT.num_nodes)
    assert updated.memory.node_nbytes + sums_nbytes == averaged.memory.node_nbytes
    assert updated.rank_traffic == averaged.rank_traffic
    assert updated.simulated.step_s < averaged.simulated.step_s


def test_the_next_forward_hides_the_parameters_that_a_step_has_not_awaited():
    now = replace(LAYOUT, policy=ShardPolicy())
    later = replace(now, policy=ShardPolicy(prefetch_params=True))
    at_once, none, some, all_ = (
        estimate(MODEL, replace(layout, forward_s=forward_s), MACHINE)
        for layout, forward_s in ((now, 0.0), (later, 0.0), (later, 0.002), (later, 1.0))
    )
    assert at_once.awaited_s == 0
    assert none.awaited_s == pytest.approx(none.phases.all_gather_s, rel=1e-2)
    assert none.simulated.step_s + none.awaited_s >= at_once.simulated.step_s
    assert none.simulated.step_s == all_.simulated.step_s < at_once.simulated.step_s
    assert none.awaited_s > some.awaited_s > all_.awaited_s > 0
    assert all_.awaited_s < 0.2 * none.awaited_s  # the first bucket
    assert all_.memory == at_once.memory
    assert estimate(MODEL, replace(later, num_nodes=1), MACHINE).awaited_s == 0


def test_no_update_comes_before_the_norm_is_known():
    clipped = estimate(MODEL, replace(LAYOUT, clips=True), MACHINE)
    assert clipped.simulated.step_s > estimate(MODEL, LAYOUT, MACHINE).simulated.step_s
    assert clipped.simulated.step_s <= sum(clipped.phases)


def test_frozen_parameters_are_neither_sent_nor_updated():
    half = tuple(i % 2 == 0 for i in range(64))
    frozen = estimate(replace(MODEL, trained=half), LAYOUT, MACHINE)
    whole = estimate(evenly(1 << 25, "bfloat16", 32), LAYOUT, MACHINE)
    assert frozen.node_traffic == whole.node_traffic
    assert frozen.memory.moments_node_nbytes == whole.memory.moments_node_nbytes
    assert frozen.memory.params_node_nbytes == 2 * whole.memory.params_node_nbytes
    none = estimate(replace(MODEL, trained=(False,) * 64), LAYOUT, MACHINE)
    assert none.node_traffic == (0, 0)
    assert none.simulated.step_s == none.phases.consensus_s


def test_merged_parameters_have_as_many_elements():
    model = Model("", (*evenly(10, "float32", 2).specs, *evenly(7, "float64", 3).specs), ())
    assert {spec.dtype: spec.numel for spec in merged(model.specs)} == {"float32": 10, "float64": 7}
    coded = [replace(spec, form=StateForm(8)) for spec in model.specs[:1]]
    assert len(merged([*coded, *model.specs])) == 3


def test_peers_by_formula():
    numel, ranks = MODEL.numel, 8
    replicated, zero_1, fsdp2 = plan_peers(MODEL, LAYOUT, MACHINE, num_modules=16)
    assert replicated.rank_nbytes == (2 + 2 + 12) * numel
    assert replicated.sent_nbytes == 2 * 2 * numel * 7 // 8
    assert zero_1.rank_nbytes == (2 + 2) * numel + 12 * numel // ranks
    assert zero_1.sent_nbytes == replicated.sent_nbytes + 2 * numel
    assert fsdp2.rank_nbytes == 16 * numel // ranks + 3 * 2 * numel // 16
    assert fsdp2.sent_nbytes == 3 * 2 * numel * 7 // 8
    update_s = 30 * numel / 400e9  # bytes of one copy: gradient, parameter and state both ways
    assert replicated.step_s == pytest.approx(replicated.sent_nbytes / 25e9 + 2 * update_s)
    assert zero_1.step_s == pytest.approx(zero_1.sent_nbytes / 25e9 + 2 * update_s / ranks)
    assert fsdp2.step_s == pytest.approx(fsdp2.sent_nbytes / 25e9 + update_s / 4)


def test_peers_move_bytes_within_a_node():
    """They average the gradients of four ranks, and copy to each what the others own."""
    numel, layout = MODEL.numel, Layout(1, 4)
    replicated, zero_1, fsdp2 = plan_peers(MODEL, layout, MACHINE)
    grads, update = 2 * numel, 30 * numel
    averaged = 4 * grads + 4 * grads  # each rank's are read, and each rank's are written
    gathered = grads + 3 * grads
    assert replicated.step_s * 400e9 == pytest.approx(averaged + 4 * update)
    assert zero_1.step_s * 400e9 == pytest.approx(averaged + gathered + update)
    scattered = 4 * grads + grads
    assert fsdp2.step_s * 400e9 == pytest.approx(2 * gathered + scattered + update)
    step_s = estimate(MODEL, layout, MACHINE).simulated.step_s
    assert all(peer.step_s > step_s for peer in (replicated, zero_1, fsdp2))


def test_whole_tensors_are_uneven():
    """Three tensors on two ranks: one has two of them. On many ranks most have none."""
    model = evenly(3 << 20, "float32", 3)
    _, zero_1, _ = plan_peers(model, Layout(1, 2), MACHINE)
    assert zero_1.rank_nbytes == 8 * model.numel + 8 * 2 * (1 << 20)
    _, zero_1, _ = plan_peers(model, Layout(4096, 8), MACHINE)
    assert zero_1.rank_nbytes == 8 * model.numel + 8 * (1 << 20)


def test_zero_1_partitions_as_torch_does():
    torch = pytest.importorskip("torch")
    optim = pytest.importorskip("torch.distributed.optim")
    sizes = [100, 90, 1000, 5, 37, 400, 400, 2, 900, 61]
    params = [torch.empty(size) for size in sizes]
    zero = optim.ZeroRedundancyOptimizer.__new__(optim.ZeroRedundancyOptimizer)
    zero._partition_parameters_cache, zero.world_size = [], 3
    zero.param_groups = [{"params": params}]
    shares = [
        sum(p.numel() for group in groups for p in group["params"])
        for groups in zero._partition_parameters()
    ]
    specs = tuple(s for i, n in enumerate(sizes) for s in _renamed(evenly(n, "float32", 1), i))
    model = Model("", specs, (True,) * len(specs))
    _, planned, _ = plan_peers(model, Layout(1, 3), MACHINE)
    assert planned.rank_nbytes == 8 * sum(sizes) + 8 * max(shares)


def _renamed(model, number):
    return [replace(spec, name=f"p{number}") for spec in model.specs]


def test_gpus():
    layout = replace(LAYOUT, placement="cuda")
    found = estimate(MODEL, layout, replace(MACHINE, gpu=GPUS["h100"]))
    assert found.memory.device_rank_nbytes == pytest.approx(
        (2 + 2 + (12 + 4) / 8) * MODEL.numel, rel=0.01
    )
    alone = Layout(1, 8)
    gpus = estimate(MODEL, replace(alone, placement="cuda"), replace(MACHINE, gpu=GPUS["h100"]))
    assert gpus.simulated.step_s < estimate(MODEL, alone, MACHINE).simulated.step_s


def test_checkpoints():
    found = plan_saves(MODEL, LAYOUT, MACHINE, node_mtbf_s=4e6)
    assert found.nbytes == (2 + 12) * MODEL.numel
    assert found.waits_s == pytest.approx(2 * found.nbytes / 4 / 400e9)
    assert found.durable_s == pytest.approx(found.waits_s + found.nbytes / 4 / 2e9)
    assert found.job_mtbf_s == 1e6
    assert found.interval_s == pytest.approx(daly_interval(found.waits_s, 1e6))
    often = plan_saves(MODEL, LAYOUT, MACHINE, node_mtbf_s=0.04)
    assert often.interval_s == often.durable_s  # no save begins before the last one has ended
    assert plan_saves(MODEL, LAYOUT, MACHINE).interval_s is None


def expected_lost(interval_s, save_s, mtbf_s):
    """Daly's complete model: the time that a second of work takes, without restarts."""
    return mtbf_s * math.expm1((interval_s + save_s) / mtbf_s) / interval_s


@pytest.mark.parametrize("ratio", [1e-6, 1e-3, 0.1, 0.5])
def test_daly_interval_is_the_best_one_of_his_model(ratio):
    save_s, mtbf_s = ratio * 1e4, 1e4
    found = daly_interval(save_s, mtbf_s)
    around = np.geomspace(found / 10, found * 10, 4001)
    best = min(expected_lost(each, save_s, mtbf_s) for each in around)
    assert expected_lost(found, save_s, mtbf_s) == pytest.approx(best, rel=2e-3)
    assert found < young_interval(save_s, mtbf_s)
    assert daly_interval(2 * mtbf_s, mtbf_s) == mtbf_s
