"""The reduction where a node has one row of averaged gradients, which backward has filled."""

from collections.abc import Mapping, Sequence

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

    Attributes:
        holds_sums: Whether the row holds sums of the node, until averages are shown in it.
        has_messages: Whether messages of other nodes may make progress possible.
    """

    holds_sums = has_messages = False

    def __init__(self, backend: Backend, node_rank: int, trace: Trace = OFF) -> None:
        super().__init__(backend, node_rank, trace)
        self._plan_of: dict[int, BucketPlan] = {}
        self._sums_of: dict[int, FloatArray] = {}  # by bucket: hooks need them over and over
        self._partition: Partition | None = None
        self._filled: set[int] = set()  # buckets that hold averages
        self._measured: set[int] = set()  # those of them whose squares are known
        self._measures = self._is_asked = False

    def lay_out(self, partition: Partition) -> None:
        """Take over the plans of a partition; the row holds no averages."""
        self._partition = partition
        self._plan_of = {plan.bucket: plan for plan in self.plans}
        self._sums_of.clear()
        self.forget()

    def has_room(self) -> bool:
        """Whether another bucket can be averaged now; makes progress."""
        return True

    def progress(self) -> None:
        """Make progress with what is in transit, without waiting."""

    def send_sums(self) -> None:
        """Begin to exchange what is only summed by node so far; ``is_idle`` tells when it is."""

    def average(self, bucket: int, rows: Rows | None) -> None:
        """Add the average of a bucket over all ranks to this rank's shard of the row.

        The first one since ``forget`` replaces what is there.

        Args:
            bucket: Its number.
            rows: The gradients of all ranks of the node in it, from its first element; None if none
                of them has any.
        """
        plan = self._plan_of.get(bucket)
        if plan is not None and rows is not None:
            assert self._partition is not None
            in_bucket = plan.shard.start - self._partition.buckets[bucket].start
            with self._trace.span("reduce_scatter", plan):
                self._average(plan, rows, in_bucket)

    def _average(self, plan: BucketPlan, rows: Rows, in_bucket: int) -> None:
        """Add an average to this rank's shard.

        Args:
            plan: The bucket.
            rows: What it is the average of.
            in_bucket: Where the shard begins in them.
        """
        bucket, is_first = plan.bucket, plan.bucket not in self._filled
        if bucket not in self._sums_of:
            self._sums_of[bucket] = plan.sums
        squares = self._square_sums[plan.chunks] if self._measures else None
        (self._measured.add if self._measures else self._measured.discard)(bucket)
        self._filled.add(bucket)
        sums, scale = self._sums_of[bucket], plan.mean_scale
        self._accumulate(rows, in_bucket, sums, squares, scale, is_first=is_first)

    def _accumulate(
        self,
        rows: Rows,
        start: int,
        out: FloatArray,
        squares: NDArray[np.float64] | None = None,
        scale: float = 1.0,
        *,
        is_first: bool,
    ) -> None:
        """Add the sum of rows to what there is, or put it there.

        Args:
            rows: The rows.
            start: Their element that belongs to the first one of ``out``.
            out: [n] in whole chunks.
            squares: [n / CHUNK_NUMEL] the squares of what is in ``out`` then.
            scale: A factor on the sum, before it is rounded.
            is_first: Whether there is nothing to add to.
        """
        kernel, whole = self._backend.kernel, Span(0, out.size)
        if is_first:
            kernel.reduce(rows, out, whole.shift(start), squares, scale)
            return
        more = np.empty(min(_PIECE_NUMEL, whole.numel), out.dtype)
        for piece in whole.chunks(_PIECE_NUMEL):
            here, added = out[piece.slice], more[: piece.numel]
            kernel.reduce(rows, added, piece.shift(start), None, scale)
            chunks = slice(piece.start // CHUNK_NUMEL, piece.stop // CHUNK_NUMEL)
            of_piece = None if squares is None else squares[chunks]
            kernel.reduce(Rows.of(here, added), here, Span(0, piece.numel), of_piece)

    def free(self) -> None:
        """See ``Reduction.free``."""
        super().free()
        self._plan_of.clear()
        self._sums_of.clear()

    def forget(self) -> None:
        """Have the next average of each bucket replace what is there."""
        self._filled.clear()
        self._measured.clear()

    def activate(self, params: int) -> int:
        """See ``Reduction.activate``: parameters in buckets without an average get zeros."""
        assert self._partition is not None
        for bucket in self._partition.buckets_of(params):
            plan = self._plan_of.get(bucket)
            if plan is not None and bucket not in self._filled:
                self._filled.add(bucket)
                plan.sums[:] = 0
        return 0

    def reset(self) -> None:
        """See ``Reduction.reset``; squares are summed in backward if the last step has asked."""
        self._measures, self._is_asked = self._is_asked, False

    def replace(self, spans: Sequence[tuple[Span, FloatArray | None]]) -> None:
        """Write values, or zeros, into this rank's shards of the row.

        Args:
            spans: Of the flat index space, with their values.
        """
        if not spans:
            return
        for plan in self.plans:
            row = plan.sums
            for span, values in spans:
                if part := span.intersect(plan.shard):
                    new = 0 if values is None else values[part.shift(-span.start).slice]
                    row[part.shift(-plan.shard.start).slice] = new
                    self._measured.discard(plan.bucket)

    def multiply(self, factors: Mapping[int, Sequence[float]]) -> None:
        """Multiply this rank's shards of the row.

        Args:
            factors: One after the other, by the number of the parameter.
        """
        for plan in self.plans if factors else ():
            if self._multiply(plan.sums, plan.shard, plan.shard.region, factors):
                self._measured.discard(plan.bucket)

    def _multiply(
        self,
        row: FloatArray,
        where: Span,
        region: int,
        factors: Mapping[int, Sequence[float]],
    ) -> bool:
        """Multiply a part of the averages; return whether there is anything to multiply.

        Args:
            row: The part.
            where: Its span of the flat index space.
            region: The region of that.
            factors: As for ``multiply``.
        """
        assert self._partition is not None
        runs: list[tuple[Span, Sequence[float]]] = []
        for index, part in self._partition.params_in(region, where):
            if more := factors.get(index):
                if runs and runs[-1][0].stop == part.start and runs[-1][1] == more:
                    part = Span(runs.pop()[0].start, part.stop)
                runs.append((part, more))
        with np.errstate(all="ignore"):
            for run, each in runs:
                for piece in run.shift(-where.start).chunks(_PIECE_NUMEL):
                    for factor in each:
                        row[piece.slice] *= row.dtype.type(factor)
        return bool(runs)

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
                self._backend.kernel.reduce(Rows.of(plan.sums), None, whole, squares)
                self._measured.add(plan.bucket)
        return self._square_sums
