"""The reduction where parameters are updated in backward, so that steps find nothing left to do."""

from collections import deque
from collections.abc import Sequence

from shardopt.backends.base import Backend, Rows, UpdatePlan
from shardopt.layout.dtypes import compute_dtype
from shardopt.layout.partition import Partition
from shardopt.layout.span import Span
from shardopt.rule.cohorts import Cohorts
from shardopt.rule.hyperparams import Hyperparams
from shardopt.store.state import StateStore
from shardopt.trace import OFF, Trace
from shardopt.transport.buckets import BucketPlan
from shardopt.transport.ring import RingReduction


class Updates:
    """Updates this rank's shards, one after the other, before a step.

    The coefficients of a parameter depend on its own steps alone, so a bucket can be updated before
    it is known which others have gradients. What differs from the last step is planned anew.

    Args:
        backend: Computes.
        state: The optimizer state.
        rule: Step counts and coefficients.
        trace: Shows updates.
    """

    def __init__(
        self, backend: Backend, state: StateStore, rule: Cohorts, trace: Trace = OFF
    ) -> None:
        self._backend, self._state, self._rule, self._trace = backend, state, rule, trace
        self._hypers: Sequence[Hyperparams] = ()
        self._mean_scale = 1.0
        self._planned = 0  # bit mask of parameters
        self._params_of: list[int] = []  # of each bucket, as a bit mask

    def lay_out(self, partition: Partition, mean_scale: float) -> None:
        """Take over another partition.

        Args:
            partition: The layout.
            mean_scale: The factor that makes averages of the sums of sources.
        """
        self._mean_scale = mean_scale
        self._params_of = [
            sum(1 << index for index, _ in partition.params_in(bucket.region, bucket))
            for bucket in partition.buckets
        ]

    def begin(self, hypers: Sequence[Hyperparams], expected: int) -> None:
        """Plan the updates of a step.

        Args:
            hypers: Of each param group.
            expected: Bit mask of the parameters that will probably have gradients.
        """
        self._hypers = hypers
        self._plan(expected)

    def update(self, plan: BucketPlan, sources: Rows, present: int) -> None:
        """Update parameters in this rank's shard of a bucket.

        Args:
            plan: The bucket.
            sources: Rows whose sum is that of the gradients of all ranks, from the shard's start.
            present: Bit mask of the parameters to update, which are in the bucket.
        """
        planned = self._planned & ~self._params_of[plan.bucket] | present
        if planned != self._planned:
            self._plan(planned)
        shard, span = plan.shard, Span(0, plan.shard.numel)
        update = UpdatePlan.of(self._rule, shard, span, compute_dtype(plan.buffers.region.dtype))
        with self._trace.span("update", plan), self._state.open(shard) as state:
            self._backend.kernel.update(sources, plan.targets, state, update)

    def count(self, present: int) -> None:
        """Have the rule plan a step of just those parameters that were updated, to commit it.

        Args:
            present: Their bit mask.
        """
        if present != self._planned:
            self._plan(present)

    def _plan(self, params: int) -> None:
        self._planned = params
        self._rule.plan(params, self._hypers, 1.0, self._mean_scale)


class UpdatingReduction(RingReduction):
    """Updates this rank's shards of buckets, as soon as all ranks have their gradients: one node.

    Implements ``Reduction``. The row of averages is never touched and takes no memory. Each update
    is the pass of a step: it reads the gradients of all ranks where they are.

    Buckets are started and settled in the same order on all ranks. In between, ranks learn what all
    nodes know of the gradients of a bucket, and decide alike what to update.

    Args:
        backend: Computes.
        node_rank: This rank on the node.
        updates: Updates shards.
        trace: As for ``RingReduction``.

    Attributes:
        updates: As given.
    """

    def __init__(
        self, backend: Backend, node_rank: int, updates: Updates, trace: Trace = OFF
    ) -> None:
        super().__init__(backend, node_rank, trace)
        self.updates = updates
        self._started: deque[tuple[int, Rows | None, int]] = deque()

    def lay_out(self, partition: Partition) -> None:
        """See ``RingReduction.lay_out``."""
        super().lay_out(partition)
        self.updates.lay_out(partition, self._mean_scale)

    def activate(self, params: int) -> int:
        """See ``Reduction.activate``; the row is never read."""
        return 0

    def start(self, bucket: int, rows: Rows | None, known: int, nbytes: int) -> None:
        """Begin with a bucket for which all ranks of the node have what they have.

        Args:
            bucket: Its number.
            rows: As in ``RingReduction.average``; they must not change before it is settled.
            known: Bits that tell what the node knows of its gradients.
            nbytes: Bytes that hold these bits, as many on all nodes.
        """
        self._started.append((bucket, rows, known))

    def gathered_known(self) -> int | None:
        """Return what the nodes know of the first bucket that is not settled: the union of bits.

        Returns:
            The bits; None until those of all nodes have arrived.
        """
        return self._started[0][2]

    def settle(self, present: int) -> None:
        """Update the parameters that have been decided on in the first bucket not yet settled.

        Args:
            present: Bit mask of the parameters to update; the same on all ranks.
        """
        bucket, rows, _ = self._started.popleft()
        plan = self._plan_of.get(bucket)
        if not present or plan is None:
            return
        assert self._partition is not None
        assert rows is not None  # some rank has a gradient
        in_bucket = plan.shard.start - self._partition.buckets[bucket].start
        self.updates.update(plan, rows.part(Span(0, plan.shard.numel).shift(in_bucket)), present)

    def free(self) -> None:
        """See ``Reduction.free``."""
        super().free()
        self._started.clear()
