"""The exchange between nodes of gradients that backward hands over: stage 2 on several nodes."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend, Rows
from shardopt.layout.partition import CHUNK_NUMEL, Partition
from shardopt.layout.ring import num_ring_staging_buffers
from shardopt.layout.span import Span
from shardopt.layout.traffic import plan_staging_buffer
from shardopt.store.buffers import ShardBuffers
from shardopt.trace import OFF, Flight, Trace
from shardopt.transport.base import Message, Transfer, Transport
from shardopt.transport.buckets import BucketPlan, StagingBuffer, plan_buckets
from shardopt.transport.ring import RingReduction

_GRADS = 1  # tag


@dataclass
class InTransit:
    """A bucket whose sums are on their way.

    Attributes:
        plan: The bucket.
        staging: Its memory.
        has_own: Whether some rank of this node has gradients in it.
        receives: What comes from each other node, if this rank has a shard.
        transfer: All its messages.
        flight: Shows it in a trace.
    """

    plan: BucketPlan
    staging: StagingBuffer
    has_own: bool
    receives: Sequence[tuple[int, Message]]
    transfer: Transfer
    flight: Flight


@dataclass
class _Forget:
    """A place in the order of buckets at which older averages are forgotten."""


class RingExchange(RingReduction):
    """Averages buckets over all ranks of all nodes into this rank's shards; see ``RingReduction``.

    [Note: averages between nodes]
    Each rank sums its lane's part of a bucket over its node straight into what it sends, receives
    the other nodes' sums of its shard, and adds the average to what it has for the shard. That is
    all that a node keeps of gradients: ``4/M`` bytes for a float32 parameter and M nodes. The ranks
    of a lane go through the same positions in the same order, and each position is one exchange, so
    that nothing has to be agreed on while backward runs. A node on which no rank has gradients for
    a position sends no elements in the place of zeros. No thread moves them: messages make
    progress in the hooks of backward, and in all waits of a step.

    If all staging buffers are in use, as other nodes are behind or the link is slow, the ring fills
    up, and what happens is what happens on one node whose ranks are behind: see
    [Note: gradients averaged in backward].

    Args:
        transport: To the other nodes.
        backend: Adds up.
        place: The node and node rank of this rank.
        wire_dtype: As ``layout.dtypes.wire_of`` returns it.
        trace: Shows buckets on their way, and the sums.
    """

    has_messages = True

    def __init__(
        self,
        transport: Transport,
        backend: Backend,
        place: tuple[int, int],
        wire_dtype: str | None,
        trace: Trace = OFF,
    ) -> None:
        super().__init__(backend, place[1], trace)
        self._transport, self._place, self._wire_dtype = transport, place, wire_dtype
        self._free: list[StagingBuffer] = []
        self._coming: deque[InTransit | _Forget] = deque()  # in the order of positions
        self._leaving: list[InTransit] = []
        self._active: set[int] = set()

    def extend(self, partition: Partition, buffers: Sequence[ShardBuffers]) -> None:
        """See ``Reduction.extend``."""
        assert self.is_idle
        first, wire = self._num_buckets, self._wire_dtype
        self.plans += plan_buckets(partition, buffers, self._place[1], wire, first)
        self._square_sums = self._backend.host_zeros(partition.numel // CHUNK_NUMEL, "float64")
        self._num_buckets = len(partition.buckets)
        # Nothing is sent from the ring itself, whose buffers are needed again.
        nbytes = plan_staging_buffer(partition, *self._place, wire, from_device=True)
        count = num_ring_staging_buffers(partition, wire)
        self._free = [StagingBuffer(self._backend, *nbytes) for _ in range(count)]
        self.staging_nbytes = sum(staging.nbytes for staging in self._free)
        self.reset()

    def has_room(self) -> bool:
        """See ``RingReduction.has_room``: whether a staging buffer is free."""
        if not self._free:
            self.progress()
        return bool(self._free)

    def progress(self) -> None:
        """See ``RingReduction.progress``; averages are added up in the order of positions."""
        self._recycle()
        while self._coming:
            first = self._coming[0]
            if isinstance(first, _Forget):
                super().forget()
            elif self._may_add(first):
                with self._trace.span("sum", first.plan):
                    self._add(first)
                first.flight.land()
                self._leaving.append(first)
            else:
                break
            self._coming.popleft()
            self._recycle()

    def average(self, bucket: int, rows: Rows | None) -> None:
        """Send the sums of a bucket over this node to the owners of its shards.

        Their average over all nodes is added to this rank's shard once all have arrived.

        Args:
            bucket: Its number.
            rows: As in ``RingReduction.average``.
        """
        plan, staging, transport = self._plan_of[bucket], self._free.pop(), self._transport
        partials = staging.partials(plan)
        receives = [
            (node, transport.post_receive(partials[node], node, _GRADS))
            for node in transport.others
            if plan.shard
        ]
        flight = self._trace.flight("reduce_scatter", plan)
        transfer = Transfer([], receives)
        started = InTransit(plan, staging, rows is not None, receives, transfer, flight)
        self._coming.append(started)
        with self._trace.span("sum", plan):
            for node in transport.others:
                if shard := plan.node_shards[node]:
                    piece = self._sum(plan, rows, shard, staging.sums(plan, node))
                    transfer.add_send(node, transport.post_send(piece, node, _GRADS))
            self._sum(plan, rows, plan.shard, partials[transport.node])

    def forget(self) -> None:
        """See ``RingReduction.forget``: what is in transit belongs to what is forgotten."""
        if self._coming:
            self._coming.append(_Forget())
        else:
            super().forget()

    def activate(self, params: int) -> int:
        """See ``Reduction.activate``; nothing has to be sent again."""
        assert self._partition is not None
        self._active.update(self._partition.buckets_of(params))
        return 0

    def is_active(self, plan: BucketPlan) -> bool:
        """See ``Reduction.is_active``."""
        return plan.bucket in self._active

    def replace(self, spans: Iterable[tuple[Span, FloatArray | None]]) -> None:
        """Write values, or zeros, into this rank's shards, and values where the node shows them.

        Zeros are written into sums of the node as well, to which more may be added.

        Args:
            spans: Of the flat index space, with their values.
        """
        spans = list(spans)
        super().replace(spans)
        for plan in self.plans:
            for span, values in spans:
                part = span.intersect(plan.lane_part)
                if part and (values is not None or self.holds_sums):
                    new = 0 if values is None else values[part.shift(-span.start).slice]
                    plan.buffers.row[plan.buffers.local(part).slice] = new

    def multiply(self, factors: Mapping[int, Sequence[float]]) -> None:
        """Multiply this rank's shards, and what the node shows of its lane: all have been shown.

        Args:
            factors: One after the other, by the number of the parameter.
        """
        super().multiply(factors)
        for plan in self.plans if factors else ():
            shown = plan.buffers.row[plan.buffers.local(plan.lane_part).slice]
            self._multiply(shown, plan.lane_part, plan.shard.region, factors)

    def sources(self, plan: BucketPlan) -> Rows:
        """See ``Reduction.sources``; parameters in buckets without an average get zeros."""
        if self.is_active(plan) and plan.bucket not in self._filled:
            self._filled.add(plan.bucket)
            plan.sums[:] = 0
        return Rows.of(plan.sums)

    def advance(self, limit: int | None = None) -> int:
        """See ``Reduction.advance``; what backward has handed over arrives before the step."""
        self.progress()
        return len(self.plans)

    @property
    def is_idle(self) -> bool:
        """See ``Reduction.is_idle``."""
        return not self._coming and not self._leaving

    def is_quiet(self) -> bool:
        """See ``Reduction.is_quiet``."""
        are_done = [each.transfer.is_done() for each in self._on_their_way()]  # look at all
        return all(are_done)

    def free(self) -> None:
        """See ``Reduction.free``; after an error messages may be in transit, and keep theirs."""
        super().free()
        self._free.clear()
        self._active.clear()

    @property
    def awaited(self) -> tuple[int, list[int]]:
        """See ``Reduction.awaited``."""
        for each in self._on_their_way():
            if nodes := each.transfer.awaited_nodes:
                return each.plan.bucket, nodes
        return 0, []

    def _on_their_way(self) -> list[InTransit]:
        """Return all buckets that are coming or leaving."""
        return [each for each in (*self._coming, *self._leaving) if isinstance(each, InTransit)]

    def _sum(self, plan: BucketPlan, rows: Rows | None, shard: Span, out: FloatArray) -> FloatArray:
        """Sum a shard over this node's ranks; return the sum, or nothing if there is none."""
        if rows is None:
            return out[:0]
        assert self._partition is not None
        span = shard.shift(-self._partition.buckets[plan.bucket].start)
        self._backend.kernel.reduce(rows, out, span, None)
        return out

    def _may_add(self, first: InTransit) -> bool:
        """Whether everything is there to add up the first bucket that is coming."""
        return first.transfer.has_arrived()

    def _add(self, arrived: InTransit) -> None:
        """Average what the nodes have sent, in the order of nodes, and add that to the shard."""
        if partials := self._partials(arrived):
            self._average(arrived.plan, Rows.of(*partials), 0)

    def _partials(self, arrived: InTransit) -> list[FloatArray]:
        """Return what the nodes have sent for this rank's shard; nothing if all of it is zero."""
        plan = arrived.plan
        empty = [node for node, message in arrived.receives if message.is_empty]
        if not arrived.has_own:
            empty.append(self._transport.node)
        partials = arrived.staging.partials(plan)
        if not plan.shard or len(empty) == len(partials):
            return []
        for node in empty:
            partials[node][:] = 0
        return partials

    def _recycle(self) -> None:
        """Take back the staging buffers of buckets that have left."""
        leaving, self._leaving = self._leaving, []
        for each in leaving:
            if each.transfer.is_done():
                self._free.append(each.staging)
            else:
                self._leaving.append(each)
