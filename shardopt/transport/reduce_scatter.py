"""Reduce-scatter between nodes: gradients to the owners of their shards, bucket by bucket."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend, Event, Rows, is_on_device
from shardopt.layout.partition import CHUNK_NUMEL, Partition
from shardopt.layout.span import Span
from shardopt.layout.traffic import NUM_STAGING_BUFFERS, plan_staging_buffer
from shardopt.store.buffers import ShardBuffers
from shardopt.trace import NOTHING, OFF, Flight, Trace
from shardopt.transport.base import Transfer, Transport
from shardopt.transport.buckets import BucketPlan, StagingBuffer, plan_buckets

_GRADS = 1  # tag


@dataclass
class _InTransit:
    """A bucket whose gradients are on their way.

    Attributes:
        plan: The bucket.
        staging: Its memory; None if it is inactive.
        transfer: Its messages.
        computed: Sums for other nodes that are being computed, with the event that ends that.
        flight: Shows it in a trace.
        summed: The end of the sum of what has arrived; None before that begins.
    """

    plan: BucketPlan
    staging: StagingBuffer | None
    transfer: Transfer
    flight: Flight
    computed: deque[tuple[Event, int, FloatArray]] = field(default_factory=deque)
    summed: Event | None = None

    def has_arrived(self) -> bool:
        """Whether everything is received, and all that is to be sent has been posted."""
        return not self.computed and self.transfer.has_arrived()

    def is_done(self) -> bool:
        """Whether everything is received and sent, and no sum reads it."""
        is_read = self.summed is not None and not self.summed.is_done()
        return not self.computed and self.transfer.is_done() and not is_read


class ReduceScatter:
    """Sends the gradients of every bucket to the owners of its shards and sums them there.

    Implements ``Reduction``. Buckets start in the order of a queue, which is the same on every
    rank, as soon as one of ``NUM_STAGING_BUFFERS`` buffers is free; each call of ``advance`` does
    what can be done without waiting. They are queued in the order in which backward tends to
    finish them, the last parameters first.

    [Note: buckets without gradients]
    A bucket of frozen parameters is *inactive* until one of them has a gradient on some rank, which
    ranks agree on when a step begins. Nothing of it is read, sent or summed, so its gradients take
    neither memory nor time. It keeps its place in the queue, where it counts as reduced at once; if
    backward has passed it already when it becomes active, it is started once more.

    Args:
        transport: To the other nodes.
        backend: Adds up.
        place: The node and node rank of this rank.
        wire_dtype: As ``layout.dtypes.wire_of`` returns it.
        trace: Shows buckets on their way, and the sums.
    """

    def __init__(
        self,
        transport: Transport,
        backend: Backend,
        place: tuple[int, int],
        wire_dtype: str | None,
        trace: Trace = OFF,
    ) -> None:
        self.plans: list[BucketPlan] = []
        self.num_started = 0
        self.staging_nbytes = 0
        self.mean_scale = 1.0
        self._transport = transport
        self._backend = backend
        self._place = place
        self._wire_dtype = wire_dtype
        self._trace = trace
        self._queue: list[int] = []
        self.num_reduced = 0
        self._square_sums = np.zeros(0)
        self._free: list[StagingBuffer] = []
        self._in_transit: deque[_InTransit] = deque()
        self._leaving: list[_InTransit] = []
        self._partition: Partition | None = None
        self._seen = 0  # bit mask of the parameters that have had a gradient
        self._active: set[int] = set()  # numbers of buckets
        self._active_at_reset: set[int] = set()

    def extend(self, partition: Partition, buffers: Sequence[ShardBuffers]) -> None:
        """See ``Reduction.extend``."""
        assert self.is_idle
        first = len(self.plans)
        plans = plan_buckets(partition, buffers, self._place[1], self._wire_dtype, first)
        self.plans = plans[::-1] + self.plans
        self._square_sums = self._backend.host_zeros(partition.numel // CHUNK_NUMEL, "float64")
        self._partition = partition
        nbytes = plan_staging_buffer(
            partition,
            *self._place,
            self._wire_dtype,
            from_device=any(is_on_device(each.row) for each in buffers),
        )
        self._free = [StagingBuffer(self._backend, *nbytes) for _ in range(NUM_STAGING_BUFFERS)]
        self.staging_nbytes = sum(staging.nbytes for staging in self._free)
        self.reset()

    def reset(self) -> None:
        """See ``Reduction.reset``."""
        assert self.is_idle
        self._queue = list(range(len(self.plans)))
        self._active_at_reset = set(self._active)
        self.num_started = 0
        self.num_reduced = 0

    def resend(self, changed: int) -> None:
        """See ``Reduction.resend``."""
        self._queue += [index for index in range(len(self.plans)) if changed >> index & 1]

    def activate(self, params: int) -> int:
        """See ``Reduction.activate``."""
        assert self._partition is not None
        new_params = params & ~self._seen
        if not new_params:
            return 0
        self._seen |= params
        new = {*self._partition.buckets_of(new_params)} - self._active
        self._active |= new
        return sum(1 << i for i, plan in enumerate(self.plans) if plan.bucket in new)

    def is_active(self, plan: BucketPlan) -> bool:
        """See ``Reduction.is_active``."""
        return plan.bucket in self._active

    def final_places(self) -> Sequence[tuple[int, BucketPlan]]:
        """See ``Reduction.final_places``."""
        last = {index: place for place, index in enumerate(self._queue)}
        return [(place, self.plans[index]) for index, place in sorted(last.items(), key=_place_of)]

    def advance(self, limit: int | None = None) -> int:
        """See ``Reduction.advance``."""
        self._send_computed()
        self._recycle()
        while self._in_transit and self._in_transit[0].has_arrived():
            arrived = self._in_transit.popleft()
            with self._trace.span("sum", arrived.plan):
                self._sum(arrived)
            arrived.flight.land()
            self._leaving.append(arrived)
            self.num_reduced += 1
            self._recycle()
        stop = len(self._queue) if limit is None else min(limit, len(self._queue))
        while self._free and self.num_started < stop:
            plan = self.plans[self._queue[self.num_started]]
            with self._trace.span("sum", plan):
                self._start(plan)
            self.num_started += 1
        return self.num_reduced

    def sources(self, plan: BucketPlan) -> Rows:
        """See ``Reduction.sources``: the average, rounded as the sum over all nodes arrives."""
        return Rows.of(plan.sums)

    def square_sums(self, present: int) -> NDArray[np.float64]:
        """See ``Reduction.square_sums``."""
        return self._square_sums

    @property
    def is_idle(self) -> bool:
        """See ``Reduction.is_idle``."""
        return not self._in_transit and not self._leaving

    def is_quiet(self) -> bool:
        """See ``Reduction.is_quiet``."""
        are_done = [each.is_done() for each in (*self._in_transit, *self._leaving)]  # look at all
        return all(are_done)

    def free(self) -> None:
        """See ``Reduction.free``; after an error messages may be in transit, and keep theirs."""
        self._backend.wait()
        self.plans.clear()
        self._free.clear()
        self._square_sums = np.zeros(0)
        self._partition, self._seen = None, 0
        self._active.clear()

    @property
    def awaited(self) -> tuple[int, list[int]]:
        """See ``Reduction.awaited``."""
        if self._in_transit:
            first = self._in_transit[0]
            return first.plan.bucket, first.transfer.awaited_nodes
        if not self._queue:
            return 0, []
        index = self._queue[min(self.num_started, len(self._queue) - 1)]
        nodes = [node for each in self._leaving for node in each.transfer.awaited_nodes]
        return self.plans[index].bucket, nodes

    def _start(self, plan: BucketPlan) -> None:
        """Sum the gradients of the node, piece by piece, and send each piece to its owner."""
        # Ranks may be at different places of the queue when a bucket becomes active: all of them
        # treat it so from the end of the queue on.
        if self.num_started < len(self.plans) and plan.bucket not in self._active_at_reset:
            self._in_transit.append(_InTransit(plan, None, Transfer([], []), NOTHING))
            return
        staging, transport, kernel = self._free.pop(), self._transport, self._backend.kernel
        partials, others = staging.partials(plan), transport.others
        receives = [
            (node, transport.post_receive(partials[node], node, _GRADS))
            for node in others
            if plan.shard
        ]
        flight = self._trace.flight("reduce_scatter", plan)
        started = _InTransit(plan, staging, Transfer([], receives), flight)
        self._in_transit.append(started)
        grads = plan.buffers.all_grads
        for node in others:
            span = plan.buffers.local(plan.node_shards[node])
            if not span:
                continue
            if plan.sends_grads:
                piece = plan.buffers.row[span.slice]
            else:
                piece = staging.sums(plan, node)
                kernel.reduce(grads, piece, span, None)
            started.computed.append((self._backend.event(), node, piece))
            self._send_computed()
        own = plan.buffers.local(plan.shard)
        kernel.reduce(grads, partials[transport.node], own, None)

    def _send_computed(self) -> None:
        """Send the pieces whose computation is over."""
        for each in self._in_transit:
            while each.computed and each.computed[0][0].is_done():
                _, node, piece = each.computed.popleft()
                message = self._transport.post_send(piece, node, _GRADS)
                each.transfer.add_send(node, message)
            if each.computed:
                return  # messages keep the order of buckets

    def _sum(self, arrived: _InTransit) -> None:
        """Average what the nodes have sent, summed in the order of nodes."""
        plan, staging = arrived.plan, arrived.staging
        if staging is None:
            return
        rows = Rows.of(*staging.partials(plan))
        span = Span(0, plan.shard.numel)
        squares = self._square_sums[plan.chunks]
        self._backend.kernel.reduce(rows, plan.sums, span, squares, plan.mean_scale)
        arrived.summed = self._backend.event()

    def _recycle(self) -> None:
        """Take back the staging buffers of buckets that have left."""
        leaving, self._leaving = self._leaving, []
        for each in leaving:
            if not each.is_done():
                self._leaving.append(each)
            elif each.staging is not None:
                self._free.append(each.staging)


def _place_of(item: tuple[int, int]) -> int:
    return item[1]
