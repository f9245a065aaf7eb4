"""The reduction where a node has one row of averaged gradients, which backward has filled."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend, Rows
from shardopt.layout.partition import CHUNK_NUMEL, Partition
from shardopt.layout.span import Span
from shardopt.trace import OFF, Trace
from shardopt.transport.buckets import BucketPlan
from shardopt.transport.reduction import InPlaceReduction

_PIECE_NUMEL = 16 * CHUNK_NUMEL  # of averages that are added, which stay in cache


class RingReduction(InPlaceReduction):
    """Averages buckets, as soon as all ranks have them, into this rank's shards of the row.

    Implements ``Reduction``: when the step begins the row holds all averages, and the squares of
    each chunk are known if the last step has asked for them. A bucket that nobody has averaged
    since ``forget`` has no value: what is left of it in the row is old.

    Args:
        backend: Adds up.
        node_rank: This rank on the node.
        trace: Shows buckets that are averaged.
    """

    def __init__(self, backend: Backend, node_rank: int, trace: Trace = OFF) -> None:
        super().__init__(backend, node_rank, trace)
        self._plan_of: dict[int, BucketPlan] = {}
        self._partition: Partition | None = None
        self._filled: set[int] = set()  # buckets that hold averages
        self._measured: set[int] = set()  # those of them whose squares are known
        self._measures = self._is_asked = False

    def lay_out(self, partition: Partition) -> None:
        """Take over the plans of a partition; the row holds no averages."""
        self._partition = partition
        self._plan_of = {plan.bucket: plan for plan in self.plans}
        self.forget()

    def average(self, bucket: int, rows: Rows) -> None:
        """Add the average of a bucket over all ranks to this rank's shard of the row.

        The first one since ``forget`` replaces what is there.

        Args:
            bucket: Its number.
            rows: The gradients of all ranks of the node in it, from its first element.
        """
        plan = self._plan_of.get(bucket)
        if plan is not None:
            with self._trace.span("reduce_scatter", plan):
                self._average(plan, rows)

    def _average(self, plan: BucketPlan, rows: Rows) -> None:
        assert self._partition is not None
        bucket = plan.bucket
        in_bucket = plan.shard.start - self._partition.buckets[bucket].start
        kernel, scale, row = self._backend.kernel, plan.mean_scale, self._row(plan)
        squares = self._square_sums[plan.chunks] if self._measures else None
        whole = Span(0, plan.shard.numel)
        (self._measured.add if self._measures else self._measured.discard)(bucket)
        if bucket not in self._filled:
            self._filled.add(bucket)
            kernel.reduce(rows, row, whole.shift(in_bucket), squares, scale)
            return
        average = np.empty(min(_PIECE_NUMEL, whole.numel), row.dtype)
        for piece in whole.chunks(_PIECE_NUMEL):
            here, more = row[piece.slice], average[: piece.numel]
            kernel.reduce(rows, more, piece.shift(in_bucket), None, scale)
            chunks = slice(piece.start // CHUNK_NUMEL, piece.stop // CHUNK_NUMEL)
            of_piece = None if squares is None else squares[chunks]
            kernel.reduce(Rows.of(here, more), here, Span(0, piece.numel), of_piece)

    def forget(self) -> None:
        """Let the next average of each bucket replace what is there."""
        self._filled.clear()
        self._measured.clear()

    def activate(self, params: int) -> int:
        """See ``Reduction.activate``: parameters in buckets without an average get zeros."""
        assert self._partition is not None
        for bucket in self._partition.buckets_of(params):
            plan = self._plan_of.get(bucket)
            if plan is not None and bucket not in self._filled:
                self._filled.add(bucket)
                self._row(plan)[:] = 0
        return 0

    def reset(self) -> None:
        """See ``Reduction.reset``; squares are summed in backward if the last step has asked."""
        self._measures, self._is_asked = self._is_asked, False

    def replace(self, spans: Iterable[tuple[Span, FloatArray | None]]) -> None:
        """Write values, or zeros, into this rank's shards of the row.

        Args:
            spans: Of the flat index space, with their values.
        """
        for plan in self.plans:
            row = self._row(plan)
            for span, values in spans:
                if part := span.intersect(plan.shard):
                    new = 0 if values is None else values[part.shift(-span.start).slice]
                    row[part.shift(-plan.shard.start).slice] = new
                    self._measured.discard(plan.bucket)

    @property
    def mean_scale(self) -> float:
        """See ``Reduction``."""
        return 1.0

    def sources(self, plan: BucketPlan) -> Rows:
        """See ``Reduction.sources``."""
        return plan.grads

    def square_sums(self, present: int) -> NDArray[np.float64]:
        """See ``Reduction.square_sums``; what is not present is zero in the row."""
        self._is_asked = True
        for plan in self.plans:
            squares = self._square_sums[plan.chunks]
            if plan.bucket not in self._filled:
                squares[:] = 0.0
            elif plan.bucket not in self._measured:
                whole = Span(0, plan.shard.numel)
                self._backend.kernel.reduce(Rows.of(self._row(plan)), None, whole, squares)
                self._measured.add(plan.bucket)
        return self._square_sums

    def _row(self, plan: BucketPlan) -> FloatArray:
        """Return this rank's shard of the row."""
        return plan.buffers.row[plan.buffers.local(plan.shard).slice]
