"""A job on more and more nodes: when each exchange stops scaling, and which bucket is best."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardopt.combinations import Job, why_not
from shardopt.layout.partition import ParamSpec, plan_partition
from shardopt.planner.estimate import BAND, Layout, StepTimes, lay_out, memory_of, merged
from shardopt.planner.machine import Machine
from shardopt.planner.model import Model
from shardopt.planner.peers import plan_peers
from shardopt.planner.simulate import Exchange

MAX_NODES = 4096
EXCHANGES: tuple[Exchange, ...] = ("lanes", "direct", "ring")
GOOD_SHARE = 0.8
"""An exchange scales as long as its step comes this close to the limit of links and memory."""

BUCKETS = tuple((1 << power) << 20 for power in range(1, 13))
"""Sizes to choose a bucket from: 2 MiB to 4 GiB."""

_MAX_BUCKETS = 4_000  # of a step that is simulated


@dataclass(frozen=True, slots=True)
class Point:
    """A job on some number of nodes, simulated.

    Attributes:
        num_nodes: Nodes.
        step_s: Seconds of a step, by exchange.
        low_s: The same with half the latency and cost per message; equal where it is measured.
        high_s: The same with twice of them; likewise.
        limit_s: The least time of a step: of links or of memory, whichever takes longer.
        node_nbytes: Memory of a node.
        peers_nbytes: That of other ways to train, by name.
        is_extrapolated: Whether it has more nodes than have been measured.
    """

    num_nodes: int
    step_s: dict[Exchange, float]
    low_s: dict[Exchange, float]
    high_s: dict[Exchange, float]
    limit_s: float
    node_nbytes: int
    peers_nbytes: dict[str, int]
    is_extrapolated: bool


@dataclass(frozen=True, slots=True)
class BucketChoice:
    """The bucket that is best on some number of nodes, simulated.

    Attributes:
        num_nodes: Nodes.
        default_nbytes: The default bucket.
        default_s: Seconds of a step with it.
        best_nbytes: The smallest bucket with a step at most 2 % longer than the shortest.
        best_s: Seconds of a step with it.
        staging_nbytes: Memory of a node for staging buffers, sums and the ring, beyond what they
            take with the best bucket.
    """

    num_nodes: int
    default_nbytes: int
    default_s: float
    best_nbytes: int
    best_s: float
    staging_nbytes: int


@dataclass(frozen=True, slots=True)
class Scaling:
    """A job on more and more nodes.

    Attributes:
        points: By number of nodes.
        stops_at: For each exchange the most nodes up to which it scales; 0 if it never does.
        buckets: The best buckets.
    """

    points: list[Point]
    stops_at: dict[Exchange, int]
    buckets: list[BucketChoice]


def scale(model: Model, layout: Layout, machine: Machine, max_nodes: int = MAX_NODES) -> Scaling:
    """Simulate a job on 1, 2, 4 ... nodes, with every exchange and with other buckets.

    Args:
        model: The parameters, the same on every number of nodes.
        layout: The job; its number of nodes is not used. Numbers on which its policy cannot be had
            are left out.
        machine: Its speeds.
        max_nodes: The most nodes.
    """
    counts = [1 << power for power in range(max_nodes.bit_length()) if 1 << power <= max_nodes]
    if machine.link_nbytes_per_s is None:
        counts = [1]
    dtypes = {spec.dtype for spec in model.specs}
    counts = [n for n in counts if why_not(layout.policy, Job(n), dtypes) is None]
    points = [_point(model, replace(layout, num_nodes=count), machine) for count in counts]
    choices = [
        choose_bucket(model, replace(layout, num_nodes=count), machine)
        for count in counts
        if count in (2, 8, 64, 512, 4096)
    ]
    return Scaling(points, {name: _stops_at(points, name) for name in EXCHANGES}, choices)


def _point(model: Model, layout: Layout, machine: Machine) -> Point:
    specs = merged(model.trained_specs)
    partition = lay_out(specs, layout)
    found: list[dict[Exchange, float]] = []
    for factor in (1.0, *(BAND if layout.is_extrapolated else ())):
        scaled = machine.scaled(factor)
        found.append(
            {
                name: StepTimes.of(partition, layout, scaled, exchange=name).run(layout).step_s
                for name in EXCHANGES
            }
        )
    memory = memory_of(lay_out(model.specs, layout), layout, model)
    low, high = found[1:] or (found[0], found[0])
    return Point(
        num_nodes=layout.num_nodes,
        step_s=found[0],
        low_s=low,
        high_s=high,
        limit_s=_limit(specs, layout, machine),
        node_nbytes=memory.node_nbytes,
        peers_nbytes={peer.name: peer.node_nbytes for peer in plan_peers(model, layout, machine)},
        is_extrapolated=layout.is_extrapolated,
    )


def _limit(specs: Sequence[ParamSpec], layout: Layout, machine: Machine) -> float:
    """Return the least time of a step: that of its bytes, divided evenly, without latencies."""
    nbytes = sum(spec.numel for spec in specs) * 8
    partition = plan_partition(specs, layout.num_nodes, layout.node_size, nbytes)
    buckets = StepTimes.of(partition, layout, machine.scaled(0.0)).buckets
    computing_s = sum(each.computing_s for each in buckets)  # messages cost nothing here
    return max(computing_s, sum(each.sending_s for each in buckets))


def choose_bucket(model: Model, layout: Layout, machine: Machine) -> BucketChoice:
    """Find the smallest bucket that is as good as any, by simulation.

    Args:
        model: The parameters.
        layout: The job.
        machine: Its speeds.
    """
    default = replace(layout, policy=replace(layout.policy, bucket_nbytes=None)).bucket
    times: dict[int, float] = {}
    memory: dict[int, int] = {}
    specs = merged(model.trained_specs)
    for nbytes in sorted({*BUCKETS, default}):
        partition = plan_partition(specs, layout.num_nodes, layout.node_size, nbytes)
        if len(partition.buckets) <= _MAX_BUCKETS or nbytes == default:
            times[nbytes] = StepTimes.of(partition, layout, machine).run(layout).step_s
            needs = memory_of(partition, layout)
            memory[nbytes] = needs.travel_node_nbytes + needs.ring_node_nbytes
    best_s = min(times.values())
    best = min(nbytes for nbytes, step_s in times.items() if step_s <= 1.02 * best_s)
    return BucketChoice(
        num_nodes=layout.num_nodes,
        default_nbytes=default,
        default_s=times[default],
        best_nbytes=best,
        best_s=times[best],
        staging_nbytes=memory[default] - memory[best],
    )


def _stops_at(points: Sequence[Point], exchange: Exchange) -> int:
    """Return the most nodes up to which every step is close to its limit."""
    last = 0
    for point in points:
        if point.num_nodes > 1:
            if point.limit_s < GOOD_SHARE * point.step_s[exchange]:
                break
            last = point.num_nodes
    return last
