"""The gradients of a bucket become sums over all ranks: the protocol, and the way on one node."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shardopt.backends.base import Backend, Rows
from shardopt.layout.partition import CHUNK_NUMEL, Partition
from shardopt.layout.span import Span
from shardopt.store.buffers import ShardBuffers
from shardopt.trace import OFF, Trace
from shardopt.transport.buckets import BucketPlan, plan_buckets


class Reduction(Protocol):
    """Sums the gradients of each bucket over all ranks, for the owners of its shards.

    Attributes:
        plans: All buckets in the order in which they are reduced.
        num_started: Entries of the queue that have been started; the queue holds every plan once,
            and those that ``resend`` named once more.
        num_reduced: Entries of the queue that have been reduced.
    """

    plans: list[BucketPlan]
    num_started: int
    num_reduced: int

    @property
    def mean_scale(self) -> float:
        """The factor that makes averages of the sum of ``sources``: 1 if they are averages."""
        ...

    def extend(self, partition: Partition, buffers: Sequence[ShardBuffers]) -> None:
        """Prepare for the buckets of a larger partition; nothing may be in transit."""
        ...

    def reset(self) -> None:
        """Start over with all buckets; nothing may be in transit."""
        ...

    def resend(self, changed: int) -> None:
        """Reduce the plans of a bit mask once more, after all others."""
        ...

    def activate(self, params: int) -> int:
        """Reduce the buckets of some parameters from now on; see [Note: buckets without gradients].

        Args:
            params: Bit mask of parameters; the same on every rank.

        Returns:
            Bit mask of the plans that were not reduced so far.
        """
        ...

    def is_active(self, plan: BucketPlan) -> bool:
        """Whether some parameter of a bucket has ever had a gradient."""
        ...

    def final_places(self) -> Sequence[tuple[int, BucketPlan]]:
        """Return each plan with its last place in the queue, in the order of places."""
        ...

    def advance(self, limit: int | None = None) -> int:
        """Make progress without waiting.

        Args:
            limit: Start no more than this many entries of the queue; None is all.

        Returns:
            How many entries of the queue have been reduced.
        """
        ...

    def sources(self, plan: BucketPlan) -> Rows:
        """Return what the update has to add up for this rank's shard of a reduced bucket."""
        ...

    def square_sums(self, present: int) -> NDArray[np.float64]:
        """Return the squares of each chunk of averages, added up, once all buckets are reduced.

        Args:
            present: Bit mask of the parameters that have a gradient on some rank; those of all
                others are zero, and need not be read.

        Returns:
            [numel / CHUNK_NUMEL], zero for the chunks of other ranks. The squares of a chunk are
            added up by its owner, in an order that depends on nothing else.
        """
        ...

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in transit."""
        ...

    def is_quiet(self) -> bool:
        """Whether all messages have arrived, summed or not; makes progress."""
        ...

    def free(self) -> None:
        """Release all buckets and memory; nothing may be in transit."""
        ...

    @property
    def awaited(self) -> tuple[int, list[int]]:
        """The bucket that is reduced next, and the nodes it waits for."""
        ...

    @property
    def staging_nbytes(self) -> int:
        """Bytes of memory for buckets in transit."""
        ...


class PresentChunks:
    """Finds the whole chunks that hold parameters with gradients; all others are zero."""

    def __init__(self) -> None:
        self._partition: Partition | None = None
        self._runs_of: tuple[int, dict[int, list[Span]]] = 0, {}  # the mask seldom changes

    def extend(self, partition: Partition) -> None:
        """Take over another layout."""
        self._partition, self._runs_of = partition, (0, {})

    def within(self, region: int, span: Span, present: int) -> Iterator[Span]:
        """Yield runs of them within a span of a region; all in the flat index space.

        Args:
            region: Index of the region.
            span: Whole chunks of it.
            present: Bit mask of the parameters that have a gradient.
        """
        if self._runs_of[0] != present:
            self._runs_of = present, {}
        runs = self._runs_of[1]
        if region not in runs:
            assert self._partition is not None
            runs[region] = self._partition.runs(region, present, CHUNK_NUMEL)
        for run in runs[region]:
            if part := run.intersect(span):
                yield part


class InPlaceReduction:
    """The reduction on one node, where nothing is sent; see ``Reduction``.

    The update itself adds up the gradients of all ranks where they lie. Only what must be known
    before, the norm of the gradient, takes a pass of its own, which leaves averages for the update;
    see [Note: where sums of gradients are kept].

    Args:
        backend: Adds up.
        node_rank: This rank on the node.
        trace: Shows the pass.
    """

    def __init__(self, backend: Backend, node_rank: int, trace: Trace = OFF) -> None:
        self.plans: list[BucketPlan] = []
        self.num_started = self.num_reduced = 0
        self.staging_nbytes = 0
        self._backend = backend
        self._node_rank = node_rank
        self._trace = trace
        self._square_sums: NDArray[np.float64] = np.zeros(0)
        self._num_buckets = 0
        self._has_sums = False
        self._mean_scale = 1.0
        self._chunks = PresentChunks()

    def extend(self, partition: Partition, buffers: Sequence[ShardBuffers]) -> None:
        """See ``Reduction.extend``."""
        plans = plan_buckets(partition, buffers, self._node_rank, None, self._num_buckets)
        self.plans += [plan for plan in plans if plan.shard]
        self._square_sums = self._backend.host_zeros(partition.numel // CHUNK_NUMEL, "float64")
        self._mean_scale = 1.0 / partition.world_size
        self._num_buckets = len(partition.buckets)
        self._chunks.extend(partition)
        self.reset()

    def reset(self) -> None:
        """See ``Reduction.reset``."""
        self._has_sums = False

    @property
    def mean_scale(self) -> float:
        """See ``Reduction``."""
        return 1.0 if self._has_sums else self._mean_scale

    def resend(self, changed: int) -> None:
        """See ``Reduction.resend``; gradients are read as they are when the step reads them."""

    def activate(self, params: int) -> int:
        """See ``Reduction.activate``; only what has a gradient is ever read."""
        return 0

    def is_active(self, plan: BucketPlan) -> bool:
        """See ``Reduction.is_active``."""
        return True

    def final_places(self) -> Sequence[tuple[int, BucketPlan]]:
        """See ``Reduction.final_places``."""
        return list(enumerate(self.plans))

    def advance(self, limit: int | None = None) -> int:
        """See ``Reduction.advance``; everything is there."""
        return len(self.plans)

    @property
    def is_idle(self) -> bool:
        """See ``Reduction.is_idle``."""
        return True

    def is_quiet(self) -> bool:
        """See ``Reduction.is_quiet``."""
        return True

    @property
    def awaited(self) -> tuple[int, list[int]]:
        """See ``Reduction.awaited``."""
        return 0, []

    def free(self) -> None:
        """See ``Reduction.free``."""
        self.plans.clear()
        self._num_buckets = 0

    def sources(self, plan: BucketPlan) -> Rows:
        """See ``Reduction.sources``."""
        return Rows.of(plan.sums) if self._has_sums else plan.grads

    def square_sums(self, present: int) -> NDArray[np.float64]:
        """See ``Reduction.square_sums``."""
        square_sums = self._square_sums
        square_sums[:] = 0.0
        for plan in self.plans:
            sums = plan.sums if len(plan.grads) > 1 else None  # else the only row is the sum
            for part in self._chunks.within(plan.shard.region, plan.shard, present):
                span = part.shift(-plan.shard.start)
                out = None if sums is None else sums[span.slice]
                squares = square_sums[part.start // CHUNK_NUMEL : part.stop // CHUNK_NUMEL]
                with self._trace.span("reduce_scatter", plan):
                    self._backend.kernel.reduce(plan.grads, out, span, squares, plan.mean_scale)
        self._backend.wait()
        self._has_sums = True
        return square_sums
