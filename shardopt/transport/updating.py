"""The reduction where parameters are updated in backward, so that steps find nothing left to do."""

from collections.abc import Sequence

from shardopt.backends.base import Backend, Rows, UpdatePlan
from shardopt.layout.dtypes import compute_dtype
from shardopt.layout.partition import Partition
from shardopt.layout.span import Span
from shardopt.rule.cohorts import Cohorts
from shardopt.rule.hyperparams import Hyperparams
from shardopt.store.state import StateStore
from shardopt.trace import OFF, Trace
from shardopt.transport.ring import RingReduction


class UpdatingReduction(RingReduction):
    """Updates this rank's shards of buckets, as soon as all ranks have their gradients.

    Implements ``Reduction``. The row of averages is never touched and takes no memory. Each update
    is the pass of a step: it reads the gradients of all ranks where they are.

    The coefficients of a parameter depend on its own steps alone, so a bucket can be updated before
    it is known which others have gradients. What differs from the last step is planned anew.

    Args:
        backend: Computes.
        node_rank: This rank on the node.
        state: The optimizer state.
        rule: Step counts and coefficients.
        trace: Shows updates.
    """

    def __init__(
        self,
        backend: Backend,
        node_rank: int,
        state: StateStore,
        rule: Cohorts,
        trace: Trace = OFF,
    ) -> None:
        super().__init__(backend, node_rank, trace)
        self._state, self._rule = state, rule
        self._hypers: Sequence[Hyperparams] = ()
        self._planned = 0  # bit mask of parameters
        self._params_of: list[int] = []  # of each bucket, as a bit mask

    def lay_out(self, partition: Partition) -> None:
        """See ``RingReduction.lay_out``."""
        super().lay_out(partition)
        self._params_of = [
            sum(1 << index for index, _ in partition.params_in(bucket.region, bucket))
            for bucket in partition.buckets
        ]

    def activate(self, params: int) -> int:
        """See ``Reduction.activate``; the row is never read."""
        return 0

    def begin(self, hypers: Sequence[Hyperparams], expected: int) -> None:
        """Plan the updates of a step.

        Args:
            hypers: Of each param group.
            expected: Bit mask of the parameters that will probably have gradients.
        """
        self._hypers = hypers
        self._plan(expected)

    def update(self, bucket: int, rows: Rows, present: int) -> None:
        """Update parameters in this rank's shard of a bucket.

        Args:
            bucket: Its number.
            rows: The gradients of all ranks in it, from its first element.
            present: Bit mask of the parameters to update.
        """
        plan = self._plan_of.get(bucket)
        if plan is None:
            return
        planned = self._planned & ~self._params_of[bucket] | present
        if planned != self._planned:
            self._plan(planned)
        assert self._partition is not None
        shard, span = plan.shard, Span(0, plan.shard.numel)
        in_bucket = shard.start - self._partition.buckets[bucket].start
        sources = rows.part(span.shift(in_bucket))
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
