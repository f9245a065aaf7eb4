"""The memory, traffic and time of a job's step."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from shardopt.combinations import checks_finite
from shardopt.layout.dtypes import wire_of
from shardopt.layout.footprint import MemoryReport, Placement, plan_memory
from shardopt.layout.partition import ParamSpec, Partition, plan_partition
from shardopt.layout.ring import num_ring_staging_buffers, plan_ring, ring_bucket_nbytes
from shardopt.layout.traffic import (
    NUM_STAGING_BUFFERS,
    Traffic,
    default_bucket_nbytes,
    plan_traffic,
)
from shardopt.planner.machine import Machine
from shardopt.planner.model import Model
from shardopt.planner.simulate import (
    BucketTimes,
    Exchange,
    NodeKind,
    Rules,
    Simulated,
    draw_kinds,
    simulate,
    times_of,
    wait_in_forward,
)
from shardopt.planner.work import averaging_nbytes, plan_work
from shardopt.policy import ShardPolicy

MEASURED_NODES = 8
"""Node counts beyond this one have not been measured: what is said of them is extrapolated."""

BAND = (0.5, 2.0)
"""Factors on latency and cost per message for the band around what is extrapolated."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a job is started and configured.

    Attributes:
        num_nodes: Nodes.
        node_size: Ranks on each node.
        policy: How it is sharded.
        placement: Where arrays are.
        clips: Whether gradients are clipped to a norm.
        backward_s: Seconds of backward, which overlap hides communication behind; 0 without.
        forward_s: Seconds of forward, which ``prefetch_params`` hides communication behind.
        slow_share: The share of its nodes that are slow.
        slowdown: The factor that they are slower by, at most.
        stragglers: Nodes that differ from others, beside these.
    """

    num_nodes: int
    node_size: int
    policy: ShardPolicy = field(default_factory=ShardPolicy)
    placement: Placement = "cpu"
    clips: bool = False
    backward_s: float = 0.0
    forward_s: float = 0.0
    slow_share: float = 0.0
    slowdown: float = 1.0
    stragglers: tuple[NodeKind, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_nodes * self.node_size

    @property
    def bucket(self) -> int:
        """Bytes of parameters in a bucket, the default if none are given."""
        if self.policy.bucket_nbytes is not None:
            return self.policy.bucket_nbytes
        if self.policy.stage == 2:
            return ring_bucket_nbytes(self.num_nodes, self.node_size)
        return default_bucket_nbytes(self.num_nodes, self.world_size)

    @property
    def kinds(self) -> tuple[NodeKind, ...]:
        """The kinds of its nodes, drawn alike every time."""
        stragglers = self.stragglers[: self.num_nodes]
        others = self.num_nodes - len(stragglers)
        return (*stragglers, *draw_kinds(others, self.slow_share, self.slowdown))

    @property
    def sends_in_backward(self) -> bool:
        """Whether gradients leave for other nodes while backward computes others.

        Those on devices do not, nor do those that a framework does not report.
        """
        policy, is_home = self.policy, self.placement == "cpu"
        return self.num_nodes > 1 and is_home and policy.overlap and policy.accumulate == "exact"

    def needs_norm(self, dtypes: Iterable[str]) -> bool:
        """Whether steps measure the norm of gradients before the update.

        Args:
            dtypes: Of the parameters.
        """
        has_float16 = "float16" in dtypes
        return self.clips or checks_finite(self.policy, self.num_nodes, has_float16=has_float16)

    @property
    def is_extrapolated(self) -> bool:
        """Whether it has more nodes than have been measured."""
        return self.num_nodes > MEASURED_NODES


class Phases(NamedTuple):
    """Seconds of each phase of a step, if it ran alone; in a step they overlap."""

    reduce_scatter_s: float
    update_s: float
    all_gather_s: float
    consensus_s: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """The plan of a job: its memory, its traffic, and the time of a step.

    Attributes:
        layout: The job.
        stage: The ZeRO stage.
        memory: Exact, padding included.
        rank_traffic: Sent in a step by the rank that sends most; exact.
        node_traffic: Sent in a step by the node that sends most; exact.
        num_buckets: Buckets of parameters.
        node_share: The shards of the node with the largest ones, over those of an average node.
        phases: The time of each phase.
        simulated: The whole step, after a backward without overlap.
        band_s: The least and the greatest time of a step, if it is extrapolated.
        hidden_s: Seconds of a step that overlap hides behind backward; 0 without backward.
        averaging_s: Seconds of memory traffic with which backward averages gradients on a node in
            stage 2, and updates parameters where it does; no part of the step. 0 in stage 1, and
            where averages are those of several nodes, whose exchange is part of the step.
        awaited_s: Seconds that the next forward waits for parameters on their way, with
            ``prefetch_params``; no part of the step. 0 without.
    """

    layout: Layout
    stage: int
    memory: MemoryReport
    rank_traffic: Traffic
    node_traffic: Traffic
    num_buckets: int
    node_share: float
    phases: Phases
    simulated: Simulated
    band_s: tuple[float, float] | None
    hidden_s: float
    averaging_s: float
    awaited_s: float


def estimate(model: Model, layout: Layout, machine: Machine) -> Estimate:
    """Compute memory and traffic, and simulate a step.

    Args:
        model: The parameters.
        layout: The job.
        machine: Its speeds.
    """
    partition = lay_out(model.specs, layout)
    moving = lay_out(model.trained_specs, layout)  # others are neither sent nor updated
    nodes = _extreme_traffic(moving, layout)
    step = StepTimes.of(moving, layout, machine)
    simulated = step.run(layout)
    hidden_s = 0.0
    if layout.backward_s and layout.sends_in_backward and model.has_hooks:
        behind = StepTimes.of(moving, layout, machine, backward_s=layout.backward_s)
        hidden_s = simulated.step_s - behind.run(layout, layout.backward_s).step_s
    band_s = None
    if layout.is_extrapolated:
        low, high = (StepTimes.of(moving, layout, machine.scaled(f)).run(layout) for f in BAND)
        band_s = low.step_s, high.step_s
    return Estimate(
        layout=layout,
        stage=layout.policy.stage,
        memory=memory_of(partition, layout, model),
        rank_traffic=max(rank for node in nodes for rank in node),
        node_traffic=max(Traffic(*map(sum, zip(*node, strict=True))) for node in nodes),
        num_buckets=len(partition.buckets),
        node_share=_node_share(moving),
        phases=step.phases,
        simulated=simulated,
        band_s=band_s,
        hidden_s=hidden_s,
        averaging_s=averaging_nbytes(moving, layout.policy) / machine.memory_nbytes_per_s,
        awaited_s=step.awaited_s(layout),
    )


def memory_of(partition: Partition, layout: Layout, model: Model | None = None) -> MemoryReport:
    """Compute the memory of a job, as ``memory_report()`` of its optimizer does.

    Args:
        partition: That of the job.
        layout: The job.
        model: All parameters, if the partition is of them; else all are taken to be trained.
    """
    policy = layout.policy
    return plan_memory(
        partition,
        wire_of(policy),
        None if model is None else model.trained,
        needs_norm=layout.needs_norm(region.dtype for region in partition.regions),
        placement=layout.placement,
        ring=plan_ring(partition, policy.ring_nbytes) if policy.stage == 2 else None,
        sums_by_node=policy.accumulate == "node",
        has_averages=not policy.update_in_backward,
        has_late=model is None or model.has_hooks,
    )


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The times of a step's buckets, latencies and consensus, for one way between nodes.

    Attributes:
        buckets: In the order in which gradients are sent.
        latency_s: Of an exchange between all nodes.
        consensus_s: Of all agreements of a step.
        rules: What a bucket must wait for.
    """

    buckets: list[BucketTimes]
    latency_s: float
    consensus_s: float
    rules: Rules

    @classmethod
    def of(
        cls,
        partition: Partition,
        layout: Layout,
        machine: Machine,
        *,
        exchange: Exchange = "lanes",
        backward_s: float = 0.0,
    ) -> "StepTimes":
        """Compute the times of a partition.

        With a direct exchange every rank is a node of its own, of those on one host, which share
        its link and its memory; messages between them take neither.
        """
        if exchange == "direct":
            partition, layout, machine = _of_lone_ranks(partition, layout, machine)
        policy = layout.policy
        work = plan_work(partition, policy, layout.placement)
        times = times_of(
            work, machine, layout.node_size, placement=layout.placement, backward_s=backward_s
        )
        others = layout.num_nodes - 1
        rounds = others if exchange == "ring" else min(1, others)
        rules = Rules(
            sums_first=(policy.stage == 2 and not policy.update_in_backward)
            or layout.needs_norm(region.dtype for region in partition.regions),
            gathers_later=policy.prefetch_params,
            num_staging=_num_staging(partition, policy),
        )
        return cls(times, rounds * machine.latency_s, _consensus_s(layout, machine), rules)

    def run(self, layout: Layout, backward_s: float = 0.0) -> Simulated:
        """Simulate the step."""
        found = simulate(
            self.buckets,
            self.latency_s,
            kinds=layout.kinds,
            backward_s=backward_s,
            rules=self.rules,
        )
        return Simulated(found.step_s + self.consensus_s, found.computing_s, found.sending_s)

    def awaited_s(self, layout: Layout) -> float:
        """Return the seconds that a forward waits for parameters that the step has not awaited."""
        if not self.rules.gathers_later or layout.num_nodes == 1:
            return 0.0
        slowdown = max(kind.link_slowdown for kind in layout.kinds)
        return wait_in_forward(self.buckets, self.latency_s, layout.forward_s, slowdown)

    @property
    def phases(self) -> Phases:
        """The time of each phase alone."""
        buckets = self.buckets
        summing_s = sum(each.reduce_s + each.post_grads_s + each.sum_s for each in buckets)
        sending_s = sum(each.send_grads_s for each in buckets)
        posting_s = sum(each.post_params_s for each in buckets)
        gathering_s = sum(each.send_params_s for each in buckets)
        return Phases(
            reduce_scatter_s=max(summing_s, sending_s) + self.latency_s,
            update_s=sum(each.update_s for each in buckets),
            all_gather_s=max(posting_s, gathering_s) + self.latency_s,
            consensus_s=self.consensus_s,
        )


def _extreme_traffic(partition: Partition, layout: Layout) -> list[list[Traffic]]:
    """Return what each rank sends of the first node and of the last.

    They have the smallest and the largest shards. Either may send most: the larger a shard, the
    less of the gradients is sent, and the more of the parameters.
    """
    nodes, lanes = {0, layout.num_nodes - 1}, range(layout.node_size)
    return [
        [plan_traffic(partition, node, lane, wire_of(layout.policy)) for lane in lanes]
        for node in sorted(nodes)
    ]


def lay_out(specs: Sequence[ParamSpec], layout: Layout) -> Partition:
    """Return where the elements of parameters are in a job."""
    return plan_partition(specs, layout.num_nodes, layout.node_size, layout.bucket)


def _num_staging(partition: Partition, policy: ShardPolicy) -> int:
    if policy.stage == 1 or partition.num_nodes == 1:
        return NUM_STAGING_BUFFERS
    return num_ring_staging_buffers(partition, wire_of(policy))


def _of_lone_ranks(
    partition: Partition, layout: Layout, machine: Machine
) -> tuple[Partition, Layout, Machine]:
    """Make every rank a node that has its share of a host's memory bandwidth and link."""
    node_size, world_size = layout.node_size, layout.world_size
    link = machine.link_nbytes_per_s
    if link is not None and layout.num_nodes > 1:
        link *= (world_size - 1) / (world_size - node_size) / node_size
    shared = replace(
        machine,
        memory_nbytes_per_s=machine.memory_nbytes_per_s / node_size,
        link_nbytes_per_s=link,
    )
    alone = replace(layout, num_nodes=world_size, node_size=1)
    specs = [param.spec for param in partition.params]
    return plan_partition(specs, world_size, 1, partition.bucket_nbytes), alone, shared


def _consensus_s(layout: Layout, machine: Machine) -> float:
    """Return the time of the two small all-reduces of a step, by recursive doubling."""
    within_s = machine.barrier_s if layout.node_size > 1 else 0.0
    rounds = math.ceil(math.log2(layout.num_nodes))
    return 2 * (within_s + rounds * (machine.latency_s + machine.message_s))


def _node_share(partition: Partition) -> float:
    last = partition.num_nodes - 1
    regions = range(len(partition.regions))
    own_numel = sum(partition.node_numel(last, region) for region in regions)
    return own_numel * partition.num_nodes / partition.numel if partition.numel else 1.0


def merged(specs: Sequence[ParamSpec]) -> list[ParamSpec]:
    """Return one parameter per region: as many buckets and as many bytes, up to padding."""
    numel = Counter[Any]()
    for spec in specs:
        numel[spec.dtype, spec.form] += spec.numel
    return [
        ParamSpec(f"{dtype} {number}", (count,), dtype, 0, form)
        for number, ((dtype, form), count) in enumerate(numel.items())
    ]
