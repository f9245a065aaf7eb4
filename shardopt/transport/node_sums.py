"""Sums of a node that are exchanged once in a step: ``ShardPolicy(accumulate="node")``."""

from collections import deque

from shardopt.backends.base import Backend, Rows
from shardopt.trace import OFF, Trace
from shardopt.transport.base import Transport
from shardopt.transport.ring_exchange import RingExchange


class NodeSums(RingExchange):
    """Sums what backward hands over in the row of the node, until ``send_sums``.

    Each rank sums its lane's part. Several backwards are thus summed over the ranks of a node
    first, over backwards second, and over nodes last, which rounds otherwise than an exchange of
    each. The row holds sums until averages are shown in it on all nodes.
    """

    holds_sums = True

    def __init__(
        self,
        transport: Transport,
        backend: Backend,
        place: tuple[int, int],
        wire_dtype: str | None,
        trace: Trace = OFF,
    ) -> None:
        super().__init__(transport, backend, place, wire_dtype, trace)
        self._summed: set[int] = set()  # buckets with sums in the row
        self._to_send: deque[int] = deque()  # buckets

    def has_room(self) -> bool:
        """See ``RingReduction.has_room``: nothing is sent yet."""
        return True

    def average(self, bucket: int, rows: Rows | None) -> None:
        """Add the sum of a bucket over this node's ranks to the row.

        Args:
            bucket: Its number.
            rows: As in ``RingReduction.average``.
        """
        plan = self._plan_of[bucket]
        if rows is None:
            return
        assert self._partition is not None
        start = plan.lane_part.start - self._partition.buckets[bucket].start
        row = plan.buffers.row[plan.buffers.local(plan.lane_part).slice]
        is_first = bucket not in self._summed
        self._summed.add(bucket)
        with self._trace.span("sum", plan):
            self._accumulate(rows, start, row, is_first=is_first)

    def forget(self) -> None:
        """See ``RingReduction.forget``."""
        self._summed.clear()
        super().forget()

    def send_sums(self) -> None:
        """See ``RingReduction.send_sums``: all buckets, in the order of travel."""
        assert self._partition is not None
        super().forget()  # averages of less than what is summed now
        every = (1 << len(self._partition.params)) - 1
        self._to_send = deque(self._partition.buckets_of(every)[::-1])

    def progress(self) -> None:
        """See ``RingReduction.progress``."""
        super().progress()
        while self._to_send and self._free:
            assert self._partition is not None
            number = self._to_send.popleft()
            bucket, buffers = self._partition.buckets[number], self._plan_of[number].buffers
            has_sums = number in self._summed
            row = buffers.row[buffers.local(bucket).slice]
            super().average(number, Rows.of(row) if has_sums else None)

    @property
    def is_idle(self) -> bool:
        """See ``Reduction.is_idle``."""
        return not self._to_send and super().is_idle
