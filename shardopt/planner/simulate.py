"""A discrete-event simulation of a step: buckets on their way through nodes and links.

[Note: what a simulated step is]
Every node has two servers that take one piece of work at a time, in the order in which it comes:
its ranks, which sum and update, and its link, which sends. A bucket is summed over the node's
ranks, sent to the owners of its shards, added up there, updated, and sent to all nodes. It has
arrived when *all* nodes have sent theirs, one latency later, as every node needs something of every
other. Staging buffers and buckets in transit are limited as in ``transport``. Lanes of a node work
at the same time and share its link, so a node's work is the sum of theirs. Not in it: switches that
are too small, other jobs, caches, and what MPI copies.

In stage 2, and where a norm is measured first, no shard is updated before all sums are there.
Stage 2 has fewer staging buffers where they would take much memory, and with ``accumulate="node"``
it sends in the step only. With ``prefetch_params`` a step ends with its last update, and the
all-gather goes on beside the next forward, whose modules wait each for its own bucket; see
``wait_in_forward``.

A step begins with an agreement of all ranks, so that a late one holds up all updates, and without
overlap the exchange of gradients too. With overlap only its own node's gradients are late.

Nodes that are equally fast do the same at the same time, so that one of each kind is simulated.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal

from shardopt.layout.footprint import Placement
from shardopt.layout.traffic import NUM_STAGING_BUFFERS
from shardopt.planner.machine import Machine
from shardopt.planner.work import BucketWork

Exchange = Literal["lanes", "direct", "ring"]
"""The way between nodes: rank to rank along each lane, as the product does; every rank with every
rank, without a sum on the node before (``share_node=False``); or around a ring along each lane."""

_Handler = Callable[[float, int, int], None]  # the time, the node and the bucket

MAX_GATHERING = 4
"""Buckets of parameters in transit at a time, as in ``transport.all_gather``."""


@dataclass(frozen=True, slots=True)
class BucketTimes:
    """The time of one bucket on a node and its link, in seconds.

    Attributes:
        ready_s: When its gradients are there, from the start of backward.
        reduce_s: To sum them over the ranks of the node.
        send_grads_s: To send them, which the link does.
        sum_s: To add up what has arrived.
        update_s: To update the node's shards.
        send_params_s: To send them.
        post_grads_s: In which ranks hand the messages with gradients to MPI.
        post_params_s: The same of parameters.
        share: Of the elements of all buckets.
    """

    ready_s: float
    reduce_s: float
    send_grads_s: float
    sum_s: float
    update_s: float
    send_params_s: float
    post_grads_s: float = 0.0
    post_params_s: float = 0.0
    share: float = 0.0

    @property
    def computing_s(self) -> float:
        """Seconds in which the ranks of a node are busy."""
        return self.reduce_s + self.post_grads_s + self.sum_s + self.update_s + self.post_params_s

    @property
    def sending_s(self) -> float:
        """Seconds in which the link is busy."""
        return self.send_grads_s + self.send_params_s


@dataclass(frozen=True, slots=True, order=True)
class NodeKind:
    """A node that differs from others.

    Attributes:
        slowdown: The factor on the time of its ranks' work.
        late_s: The seconds that one of its ranks comes later than others.
        link_slowdown: The factor on the time of what it sends.
    """

    slowdown: float = 1.0
    late_s: float = 0.0
    link_slowdown: float = 1.0


@dataclass(frozen=True, slots=True)
class Rules:
    """The order that the buckets of a step must keep.

    Attributes:
        sums_first: Whether no shard is updated before all gradients are summed.
        gathers_later: Whether parameters are sent after the step.
        num_staging: Buckets of gradients in transit at a time.
    """

    sums_first: bool = False
    gathers_later: bool = False
    num_staging: int = NUM_STAGING_BUFFERS


ON_THE_FLY = Rules()
"""Each bucket goes its way alone."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """A simulated step.

    Attributes:
        step_s: From the end of backward, where no rank is late, to the end of the step.
        computing_s: In which the ranks of the slowest node work.
        sending_s: In which the slowest link is busy.
    """

    step_s: float
    computing_s: float
    sending_s: float


def times_of(
    work: Sequence[BucketWork],
    machine: Machine,
    node_size: int,
    *,
    placement: Placement = "cpu",
    backward_s: float = 0.0,
) -> list[BucketTimes]:
    """Turn the bytes and messages of buckets into seconds.

    Args:
        work: The buckets, in the order in which they are sent.
        machine: Its speeds.
        node_size: Ranks on a node.
        placement: Where arrays are.
        backward_s: Seconds in which gradients become ready, evenly; 0 if all of them are there.
    """
    link, message_s = machine.link_nbytes_per_s or math.inf, machine.message_s
    total, done, times = sum(each.numel for each in work), 0, []
    for each in work:
        done += each.numel
        reduced, summed, updated = (
            moved.seconds(machine, node_size, placement)
            for moved in (each.reduced, each.summed, each.updated)
        )
        times.append(
            BucketTimes(
                ready_s=backward_s * done / total,
                reduce_s=reduced,
                post_grads_s=each.grads_messages * message_s,
                send_grads_s=each.grads_nbytes / link,
                sum_s=summed,
                update_s=updated,
                post_params_s=each.params_messages * message_s,
                send_params_s=each.params_nbytes / link,
                share=each.numel / total,
            )
        )
    return times


def simulate(
    times: Sequence[BucketTimes],
    latency_s: float = 0.0,
    *,
    kinds: Sequence[NodeKind] = (NodeKind(),),
    backward_s: float = 0.0,
    rules: Rules = ON_THE_FLY,
) -> Simulated:
    """Simulate a step; see [Note: what a simulated step is].

    Args:
        times: The buckets, in the order in which they are sent.
        latency_s: Of an exchange between all nodes: a message's, or those around a ring.
        kinds: The kinds of nodes; those that are alike may be named once.
        backward_s: Seconds until updates may begin; 0 if gradients are sent by the step itself.
        rules: What buckets must wait for.
    """
    return _Simulation(times, latency_s, sorted(set(kinds)), backward_s, rules).run()


def wait_in_forward(
    times: Sequence[BucketTimes], latency_s: float, forward_s: float, link_slowdown: float = 1.0
) -> float:
    """Return how long a forward waits for parameters that are sent from its beginning on.

    They are sent in the order in which it needs them, which is the opposite of that of gradients.

    Args:
        times: The buckets, in the order in which gradients are sent.
        latency_s: As in ``simulate``.
        forward_s: Seconds of a forward that waits for nothing.
        link_slowdown: The factor on what the slowest node sends.
    """
    posted_s = sent_s = now_s = 0.0
    for each in reversed(times):
        posted_s += each.post_params_s
        sent_s = max(posted_s, sent_s) + each.send_params_s * link_slowdown
        now_s = max(now_s, sent_s + latency_s) + each.share * forward_s
    return max(0.0, now_s - forward_s)


class _Simulation:
    """The state of all nodes, and the events to come: times, and the methods they call."""

    def __init__(
        self,
        times: Sequence[BucketTimes],
        latency_s: float,
        kinds: Sequence[NodeKind],
        backward_s: float,
        rules: Rules,
    ) -> None:
        self._times, self._latency_s, self._backward_s = times, latency_s, backward_s
        self._kinds, self._rules = kinds, rules
        self._agreed_s = backward_s + max(kind.late_s for kind in kinds)
        self._nodes = nodes = range(len(kinds))
        self._events: list[tuple[float, int, _Handler, int, int]] = []
        self._num_events = 0
        self._computing = [0.0 for _ in nodes]  # free again at
        self._sending = [0.0 for _ in nodes]
        self._computed_s = [0.0 for _ in nodes]
        self._waiting: list[deque[int]] = [deque() for _ in nodes]  # for a staging buffer
        self._summed: list[deque[int]] = [deque() for _ in nodes]  # for their update
        self._num_summed = [0 for _ in nodes]
        self._num_staging = [rules.num_staging for _ in nodes]
        self._num_gathering = [0 for _ in nodes]
        self._sent_by = [0 for _ in times]
        self._published_by = [0 for _ in times]

    def run(self) -> Simulated:
        """Handle all events, and return what took how long."""
        for node in self._nodes:
            late_s = self._kinds[node].late_s if self._backward_s else self._agreed_s
            for bucket, times in enumerate(self._times):
                self._post(times.ready_s + late_s, self._be_ready, node, bucket)
            self._post(self._agreed_s, self._begin_step, node)
        now_s = 0.0
        while self._events:
            now_s, _, handle, node, bucket = heappop(self._events)
            handle(now_s, node, bucket)
        sending_s = sum(times.sending_s for times in self._times)
        sending_s *= max(kind.link_slowdown for kind in self._kinds)
        return Simulated(now_s - self._backward_s, max(self._computed_s), sending_s)

    # -- events, in the order in which a bucket meets them -----------------------------------------

    def _be_ready(self, now_s: float, node: int, bucket: int) -> None:
        self._waiting[node].append(bucket)
        self._start_reducing(now_s, node)

    def _send_grads(self, now_s: float, node: int, bucket: int) -> None:
        self._send(now_s, self._times[bucket].send_grads_s, self._leave, node, bucket)

    def _leave(self, now_s: float, node: int, bucket: int) -> None:
        self._sent_by[bucket] += 1
        if self._sent_by[bucket] == len(self._nodes):
            self._arrive(now_s, self._sum, bucket)

    def _sum(self, now_s: float, node: int, bucket: int) -> None:
        self._compute(now_s, self._times[bucket].sum_s, self._be_summed, node, bucket)

    def _be_summed(self, now_s: float, node: int, bucket: int) -> None:
        self._num_staging[node] += 1
        self._num_summed[node] += 1
        self._summed[node].append(bucket)
        self._start_reducing(now_s, node)  # before updates, so that the link has work
        self._start_updating(now_s, node)

    def _begin_step(self, now_s: float, node: int, bucket: int) -> None:
        self._start_updating(now_s, node)

    def _send_params(self, now_s: float, node: int, bucket: int) -> None:
        self._send(now_s, self._times[bucket].send_params_s, self._publish, node, bucket)

    def _publish(self, now_s: float, node: int, bucket: int) -> None:
        self._published_by[bucket] += 1
        if self._published_by[bucket] == len(self._nodes):
            self._arrive(now_s, self._be_gathered, bucket)

    def _be_gathered(self, now_s: float, node: int, bucket: int) -> None:
        self._num_gathering[node] -= 1
        self._start_updating(now_s, node)

    # -- servers -----------------------------------------------------------------------------------

    def _start_reducing(self, now_s: float, node: int) -> None:
        waiting = self._waiting[node]
        while waiting and self._num_staging[node]:
            self._num_staging[node] -= 1
            bucket = waiting.popleft()
            times = self._times[bucket]
            work_s = times.reduce_s + times.post_grads_s
            self._compute(now_s, work_s, self._send_grads, node, bucket)

    def _start_updating(self, now_s: float, node: int) -> None:
        summed, rules = self._summed[node], self._rules
        if rules.sums_first and self._num_summed[node] < len(self._times):
            return
        while summed and now_s >= self._agreed_s and self._num_gathering[node] < MAX_GATHERING:
            self._num_gathering[node] += 1
            bucket = summed.popleft()
            times = self._times[bucket]
            if rules.gathers_later:
                self._compute(now_s, times.update_s, self._be_gathered, node, bucket)
                continue
            work_s = times.update_s + times.post_params_s
            self._compute(now_s, work_s, self._send_params, node, bucket)

    def _compute(self, now_s: float, work_s: float, then: _Handler, node: int, bucket: int) -> None:
        taken_s = work_s * self._kinds[node].slowdown
        self._computing[node] = max(now_s, self._computing[node]) + taken_s
        self._computed_s[node] += taken_s
        self._post(self._computing[node], then, node, bucket)

    def _send(self, now_s: float, send_s: float, then: _Handler, node: int, bucket: int) -> None:
        taken_s = send_s * self._kinds[node].link_slowdown
        self._sending[node] = max(now_s, self._sending[node]) + taken_s
        self._post(self._sending[node], then, node, bucket)

    def _arrive(self, now_s: float, then: _Handler, bucket: int) -> None:
        """Deliver a bucket to all nodes, as the last of them has sent it."""
        for node in self._nodes:
            self._post(now_s + self._latency_s, then, node, bucket)

    def _post(self, time_s: float, then: _Handler, node: int, bucket: int = 0) -> None:
        self._num_events += 1
        heappush(self._events, (time_s, self._num_events, then, node, bucket))


def draw_kinds(
    num_nodes: int, share: float, slowdown: float, seed: int = 0
) -> tuple[NodeKind, ...]:
    """Draw the kinds of nodes of which some are slow, each by a factor of its own.

    Args:
        num_nodes: Nodes of the job.
        share: The share of nodes that are slow, to the nearest number of them.
        slowdown: The largest factor; drawn evenly between 1 and it, in steps of a hundredth.
        seed: Of the drawing.
    """
    drawn = random.Random(seed)
    num_slow = round(share * num_nodes)
    kinds = {NodeKind(round(drawn.uniform(1, slowdown), 2)) for _ in range(num_slow)}
    return tuple(sorted(kinds | ({NodeKind()} if num_slow < num_nodes else set())))
