"""Simulated steps against closed forms: exact where there is one."""

import math
from dataclasses import replace

import pytest

from shardopt.layout.partition import ParamSpec, plan_partition
from shardopt.layout.traffic import plan_traffic
from shardopt.planner.estimate import Layout, StepTimes
from shardopt.planner.machine import GPUS, make_machine
from shardopt.planner.simulate import BucketTimes, NodeKind, draw_kinds, simulate, times_of
from shardopt.planner.work import plan_work
from shardopt.policy import ShardPolicy

SPEEDS = {"memory_nbytes_per_s": 100e9, "link_nbytes_per_s": 1e9}
MACHINE = make_machine(SPEEDS, {}, None, 2)
QUICK = replace(MACHINE, latency_s=0.0, message_s=0.0, barrier_s=0.0)
ONE = BucketTimes(0.0, 2.0, 5.0, 3.0, 7.0, 11.0)


def exactly(value):
    return pytest.approx(value, rel=1e-12)


def partition_of(num_nodes, node_size, dtype="float32", bucket_nbytes=1 << 20):
    numel = num_nodes * node_size * 4096 * 64  # shards are all equal
    return plan_partition([ParamSpec("p", (numel,), dtype, 0)], num_nodes, node_size, bucket_nbytes)


def test_one_bucket_takes_its_parts_one_after_the_other():
    found = simulate([ONE], 0.5)
    assert found.step_s == exactly(2 + 5 + 0.5 + 3 + 7 + 11 + 0.5)
    assert (found.computing_s, found.sending_s) == (exactly(12), exactly(16))


def test_the_slowest_node_is_waited_for():
    kinds = [NodeKind(), NodeKind(3.0), NodeKind(1.5)]
    assert simulate([ONE], 0.5, kinds=kinds).step_s == exactly(3 * 12 + 16 + 1)
    late = simulate([ONE], 0.5, kinds=[NodeKind(), NodeKind(1.0, 4.0)])
    assert late.step_s == exactly(4 + 12 + 16 + 1)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_a_link_at_half_rate_takes_twice_as_long(count):
    """Its own node's bytes at half rate; others wait, and send meanwhile what they have."""
    buckets = [BucketTimes(0, 0, 1.5, 0, 0, 2.5)] * count
    kinds = [NodeKind(), NodeKind(link_slowdown=2.0)]
    found = simulate(buckets, kinds=kinds)
    assert (found.step_s, found.sending_s) == (exactly(8 * count), exactly(8 * count))
    both = simulate([ONE], 0.5, kinds=[NodeKind(), NodeKind(3.0, link_slowdown=2.0)])
    assert both.step_s == exactly(3 * 12 + 2 * 16 + 1)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_late_rank_holds_up_all_of_a_step(count):
    """Without overlap nothing is sent before all ranks have agreed on the step."""
    buckets = [replace(ONE, ready_s=0.0)] * count
    kinds = [NodeKind(), NodeKind(late_s=4.0)]
    alone = simulate(buckets, 0.5)
    assert simulate(buckets, 0.5, kinds=kinds).step_s == exactly(alone.step_s + 4)


def test_with_overlap_a_late_rank_delays_the_last_bucket_and_all_updates():
    buckets = [BucketTimes(t, 0, 1, 0, 0, 1) for t in (2.0, 4.0, 6.0, 8.0)]
    kinds = [NodeKind(), NodeKind(late_s=3.0)]
    on_time = simulate(buckets, backward_s=8).step_s
    assert simulate(buckets, kinds=kinds, backward_s=8).step_s == exactly(on_time + 3)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_links_alone(count):
    """Without work, something is on the link at any time: steps take their bytes over it."""
    buckets = [BucketTimes(0, 0, 1.5, 0, 0, 2.5)] * count
    assert simulate(buckets).step_s == exactly(4 * count)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("slowdown", [1.0, 2.5])
def test_memory_alone(count, slowdown):
    buckets = [BucketTimes(0, 1, 0, 2, 3, 0)] * count
    kinds = [NodeKind(), NodeKind(slowdown)]
    assert simulate(buckets, kinds=kinds).step_s == exactly(6 * count * slowdown)


def test_two_buckets_by_hand():
    """0-1 sum both; 1-3, 3-5 send; updates at 3 and 5; 5-6 and 6-7 send parameters."""
    buckets = [BucketTimes(0, 0.5, 2, 0, 1, 1)] * 2
    # 0.5 reduced, 2.5 sent, 3.5 updated; the second leaves at 4.5, after which the first's go.
    assert simulate(buckets).step_s == exactly(6.5)


def test_backward_hides_what_is_ready_early():
    buckets = [BucketTimes(t, 0, 1, 0, 0, 1) for t in (2.0, 4.0, 6.0, 8.0)]
    assert simulate(buckets, backward_s=8).step_s == exactly(1 + 4)  # the last one's, and updates
    together = simulate([replace(each, ready_s=0) for each in buckets])
    assert together.step_s == exactly(8)


def test_no_parameters():
    assert simulate([], 1.0).step_s == 0


def test_nothing_is_sent_on_one_node():
    partition = partition_of(1, 4)
    times = times_of(plan_work(partition), QUICK, 4)
    nbytes = (4 * 4 + 24) * partition.numel  # four gradients; parameters and moments both ways
    assert simulate(times).step_s == exactly(nbytes / 100e9)
    assert sum(each.send_grads_s + each.send_params_s for each in times) == 0


@pytest.mark.parametrize(("dtype", "item", "state"), [("float32", 4, 16), ("bfloat16", 2, 24)])
@pytest.mark.parametrize(("num_nodes", "node_size"), [(2, 2), (8, 4), (4, 1)])
def test_with_infinite_links_a_step_is_its_bytes_in_memory(
    dtype, item, state, num_nodes, node_size
):
    partition = partition_of(num_nodes, node_size, dtype, 4 << 20)
    machine = replace(QUICK, link_nbytes_per_s=math.inf)
    wire = item if node_size == 1 else 4
    own = partition.numel // num_nodes
    reduced = own if node_size == 1 else partition.numel  # a single rank's are sent as they are
    nbytes = (node_size * item + wire) * reduced  # gradients are read, and sums written
    nbytes += (num_nodes * wire + 4) * own  # what nodes have sent is read, and the sum written
    nbytes += (4 + 2 * item + state) * own  # sum, parameters, moments and masters
    step = StepTimes.of(partition, Layout(num_nodes, node_size), machine)
    assert step.run(Layout(num_nodes, node_size)).step_s == exactly(nbytes / 100e9)


@pytest.mark.parametrize(("dtype", "wire"), [("float32", None), ("bfloat16", None)])
@pytest.mark.parametrize(("num_nodes", "node_size"), [(2, 1), (3, 2), (8, 4)])
def test_with_infinite_memory_a_step_is_its_bytes_over_the_link(dtype, wire, num_nodes, node_size):
    partition = partition_of(num_nodes, node_size, dtype, 4 << 20)
    layout = Layout(num_nodes, node_size)
    machine = replace(QUICK, memory_nbytes_per_s=math.inf)
    lanes = range(node_size)
    sent = sum(plan_traffic(partition, num_nodes - 1, lane, wire).nbytes for lane in lanes)
    step = StepTimes.of(partition, layout, machine)
    assert step.run(layout).step_s == exactly(sent / 1e9)
    ring = StepTimes.of(partition, layout, machine, exchange="ring")
    assert ring.run(layout).step_s == exactly(sent / 1e9)


def test_ranks_that_are_nodes_of_their_own_send_as_often_as_there_are_of_them():
    """Their link is shared, and what stays on the host does not take it."""
    partition = partition_of(4, 2)
    machine = replace(QUICK, memory_nbytes_per_s=math.inf)
    layout = Layout(4, 2, ShardPolicy(bucket_nbytes=partition.bucket_nbytes))
    lanes = StepTimes.of(partition, layout, machine).run(layout).step_s
    direct = StepTimes.of(partition, layout, machine, exchange="direct").run(layout).step_s
    assert direct == exactly(2 * lanes)


@pytest.mark.parametrize("num_nodes", [2, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bucket_nbytes", [1, 100_000, 1 << 20, 1 << 30])
def test_work_adds_up_to_the_traffic_of_the_plan(num_nodes, dtype, bucket_nbytes):
    specs = [ParamSpec(f"p{i}", (n,), dtype, 0) for i, n in enumerate([5, 70_000, 300_000])]
    partition = plan_partition(specs, num_nodes, 2, bucket_nbytes)
    work = plan_work(partition)
    last = [plan_traffic(partition, num_nodes - 1, lane) for lane in (0, 1)]
    assert sum(each.grads_nbytes + each.params_nbytes for each in work) == sum(
        traffic.nbytes for traffic in last
    )
    messages = sum(each.grads_messages + each.params_messages for each in work)
    assert messages >= max(traffic.messages for traffic in last)
    assert sum(each.numel for each in work) == partition.numel


@pytest.mark.parametrize("field", ["memory_nbytes_per_s", "link_nbytes_per_s"])
def test_a_faster_machine_takes_no_longer(field):
    partition = partition_of(4, 2)
    layout = Layout(4, 2)
    faster = replace(MACHINE, **{field: 2 * getattr(MACHINE, field)})
    slow, fast = (StepTimes.of(partition, layout, m).run(layout).step_s for m in (MACHINE, faster))
    assert fast <= slow
    cheap = StepTimes.of(partition, layout, MACHINE.scaled(0.5)).run(layout).step_s
    dear = StepTimes.of(partition, layout, MACHINE.scaled(2)).run(layout).step_s
    assert cheap < slow < dear


def test_gpus_are_held_up_by_their_slowest_way():
    gpu = GPUS["h100"]
    machine = make_machine(SPEEDS, {}, gpu, 2)
    partition = partition_of(1, 4)
    (work,) = {each.updated for each in plan_work(partition, placement="cuda")}
    count = len(partition.buckets)
    numel = partition.numel // count
    assert work.memory_nbytes == (4 * 4 + 24) * numel
    assert work.peer_nbytes == 3 * (4 + 4) * numel
    assert work.seconds(machine, 4, "cuda") == exactly(
        max(40 * numel / (4 * gpu.nbytes_per_s), 24 * numel / (4 * gpu.peer_nbytes_per_s))
    )
    (work,) = {each.updated for each in plan_work(partition, placement="offload")}
    assert work.host_nbytes == 4 * (4 + 4) * numel


def test_slow_nodes_are_drawn_alike_every_time():
    kinds = draw_kinds(4096, 0.05, 2.0, seed=1)
    assert kinds == draw_kinds(4096, 0.05, 2.0, seed=1)
    assert kinds[0] == NodeKind()
    assert 1 < max(kind.slowdown for kind in kinds) <= 2
    assert len(kinds) <= 102  # alike nodes are simulated once
    assert draw_kinds(3, 1.0, 1.0) == (NodeKind(),)


def test_stragglers_are_nodes_of_the_job():
    late, slow = NodeKind(late_s=1.0), NodeKind(link_slowdown=2.0)
    assert set(Layout(4, 1, stragglers=(late, slow)).kinds) == {late, slow, NodeKind()}
    assert Layout(2, 1, stragglers=(late, slow)).kinds == (late, slow)
    assert Layout(1, 1, stragglers=(late, slow)).kinds == (late,)
