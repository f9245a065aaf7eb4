"""One step of all ranks, from gradients to updated parameters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from shardopt.backends.base import ALL_FINITE, UpdatePlan
from shardopt.comm.consensus import attempt
from shardopt.core.averaging import Averaging, require_loss_scale
from shardopt.core.consensus import StepConsensus
from shardopt.core.parts import Parts
from shardopt.core.shared_params import AgreedChanges, SharedParams, UserChanges
from shardopt.layout.dtypes import compute_dtype
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.params.inputs import AgreedInputs, LocalInputs
from shardopt.report import StepReport, Stopwatch
from shardopt.rule.hyperparams import Hyperparams
from shardopt.transport.sync import ReducedShard

_NO_PARAM = 1 << 62
"""An index larger than that of any parameter."""


@dataclass(frozen=True, slots=True)
class StepCall:
    """The arguments of ``step()``.

    Attributes:
        loss_scale: See ``Optimizer.step``.
        overflowed: Likewise.
        error: An error that the front end has met with, to be raised on every rank, or None.
        num_writes: How often the front end's framework has written to each gradient since backward.
    """

    loss_scale: float = 1.0
    overflowed: bool = False
    error: Exception | None = None
    num_writes: int = 0


class _Result(NamedTuple):
    """The outcome of a step, for its report; see ``StepReport``.

    Attributes:
        norm: Of the averaged gradient, or None.
        factor: On the gradient, by clipping; None if the step was skipped.
        copied_nbytes: By this rank.
        diverged: What ranks have written different values to.
    """

    norm: float | None
    factor: float | None
    copied_nbytes: int
    diverged: Sequence[str]


class Step:
    """Runs steps; see ``run``.

    Args:
        parts: The optimizer's.
        params: The parameters in shared memory.

    Attributes:
        consensus: The meetings of all ranks around a step.
        averaging: Averages gradients before a step.
    """

    def __init__(self, parts: Parts, params: SharedParams) -> None:
        self.consensus = StepConsensus(parts.consensus)
        self.averaging = Averaging(parts, self.consensus)
        self._parts = parts
        self._params = params

    def run(self, call: StepCall, before: StepReport) -> tuple[StepReport, list[int]]:
        """Average the gradients of all ranks and update the parameters.

        Collective: every rank.

        Args:
            call: The arguments of this rank.
            before: The report of the step before.

        Returns:
            The report of this step, and the lowest vote for each background work.
        """
        parts = self._parts
        number, trace, watch = before.step + 1, parts.trace, Stopwatch(parts.trace)
        found = attempt(self._inspect, call, number)
        parts.memory.publish()
        with trace.span("consensus", step=number):
            agreed = self.consensus.enter(found, number)  # every rank raises, or none does
        parts.memory.acquire()
        changes = self._params.agree(agreed.replaced, agreed.written)
        copied_nbytes = self._adopt(found.value or LocalInputs(), agreed, changes, number)
        parts.sync.copies.begin(agreed.present)
        watch.lap("agree")
        norm = self._global_norm(agreed, number)
        factor = None if agreed.overflowed else parts.clipping.factor(norm)  # None: skip the step
        watch.lap("reduce")
        updated = None if factor is None else agreed.present
        parts.sync.copies.begin_update(updated or 0, changes.mask)
        later = None if changes or factor is None else parts.prefetch.order()
        if factor is not None:
            self._update(agreed, factor, publishes=later is None)
            parts.rule.commit()  # the commit point: step counts advance here
            parts.registry.bump_version(agreed.present)
            parts.note_update(agreed.present)
        if changes.written:
            self._params.publish_written(changes, number, updated=updated)
        watch.lap("update")
        parts.memory.publish()
        with trace.span("consensus", step=number):
            ends = self._first_poisoned(), parts.prefetch.order_digest()
            poisoned, is_same_order, votes = self.consensus.leave(*ends, number)
        parts.memory.acquire()
        if later is not None:  # all-gather in the next forward; a consensus would wait behind it
            parts.prefetch.send(later)
        self._show(changes, updated or 0)
        watch.lap("finish")
        result = _Result(norm, factor, copied_nbytes, changes.diverged)
        report = self._report(number, agreed, result, watch.seconds)
        parts.prefetch.start_step(is_same_order=is_same_order)
        parts.start_step(number + 1, was_changed=agreed.changed != 0)
        parts.prefetch.finish_copies()  # all ranks have started the next step, or will
        self._params.refresh()
        self.averaging.end()
        known = before.without_poison() if changes.params else before
        return report.with_poison(self._name_of(poisoned), known), votes

    # -- before the update -------------------------------------------------------------------------

    def _inspect(self, call: StepCall, step: int) -> LocalInputs:
        """Find this rank's inputs of a step.

        Raises:
            Exception: Something is wrong with them.
        """
        averaging, registry = self.averaging, self._parts.registry
        unseen = attempt(self._parts.prefetch.require_read)
        held = attempt(self._parts.overlap.hold)  # before other gradients are copied in
        seen = attempt(registry.adapter.were_grads_written, call.num_writes)
        taken = attempt(self._parts.grads.take, step)  # with all ranks, whatever else is wrong
        if call.error is not None:
            raise call.error
        averaging.require_unmixed()
        loss_scale = require_loss_scale(call.loss_scale)
        changed = attempt(self._find_changes)
        found = [unseen.error, held.error, seen.error, taken.error]
        # A value that cannot be used is named before its gradient; after updates it may follow
        # from what went wrong before.
        found.insert(len(found) if self._parts.grads.are_updates else 0, changed.error)
        for error in found:
            if error is not None:
                raise error
        changes, hypers = changed.value or UserChanges(), self._read_hypers()
        present, copied_nbytes = taken.value or (0, 0)
        self._parts.send_grads(present)
        return LocalInputs(
            hypers=hypers,
            replaced=changes.replaced,
            written=changes.written,
            present=present,
            loss_scale=loss_scale,
            overflowed=bool(call.overflowed),
            changed=(averaging.changed if averaging.is_done else held.value) or 0,
            edited=bool(seen.value) and self._parts.topology.world_size > 1,
            copied_nbytes=copied_nbytes + averaging.copied_nbytes,
            same={
                "max_grad_norm": self._parts.clipping.max_grad_norm,
                **averaging.describe(loss_scale, present),
                **self._parts.grads.describe(loss_scale),
            },
        )

    def _find_changes(self) -> UserChanges:
        """Find what this rank's user has done since the last step."""
        return self._params.find_changes()

    def _read_hypers(self) -> Sequence[Hyperparams]:
        """Return the hyperparameters of each param group for this step."""
        return self._parts.registry.read_hypers()

    def _adopt(
        self, inputs: LocalInputs, agreed: AgreedInputs, changes: AgreedChanges, step: int
    ) -> int:
        """Adopt what users have done to parameters and state, and make gradients alike.

        Returns:
            Bytes that this rank has copied for the step so far.
        """
        parts, copied_nbytes, changed = self._parts, inputs.copied_nbytes, agreed.changed
        parts.adopt_unseen(changes.winners)
        if changes:
            mine = UserChanges(inputs.replaced, inputs.written)
            copied_nbytes += self._params.adopt(mine, changes)
        if inputs.loss_scale != agreed.loss_scale:
            parts.sync.copies.keep_grads()
            parts.grads.scale(agreed.loss_scale / inputs.loss_scale)
            parts.send_grads(inputs.present)
        if changes.winners or agreed.rescaled:
            parts.meet(step, "adopt")
            self._params.show_kernel(changes.winners)
        if agreed.rescaled:  # everything sent so far had the old scale
            changed = parts.overlap.sent_by_any(step)
        parts.grads.adopt_writes(agreed.present)
        changed |= parts.sync.reduction.activate(agreed.present)
        if not self.averaging.is_done:
            parts.sync.resend(changed)
        return copied_nbytes

    def _global_norm(self, agreed: AgreedInputs, step: int) -> float | None:
        """Compute the norm of the averaged gradient, if anything needs it before the update."""
        parts = self._parts
        if agreed.overflowed:
            parts.overlap.settle(step)
            return None
        if not parts.clipping.needs_norm:
            return None
        if not parts.registry.partition.numel:
            return 0.0
        # Each chunk has one owner, so that the allreduce only adds zeros to its sum; chunks are
        # added up in flat order. So the bits do not depend on how they are shared out.
        mine = parts.sync.square_sums(agreed.present, averaged=self.averaging.is_done)
        square_sums = parts.collectives.allreduce(mine, MPI.SUM, step, "reduce")
        return math.sqrt(np.cumsum(square_sums)[-1]) / agreed.loss_scale

    def _show(self, changes: AgreedChanges, updated: int) -> None:
        """Have all parameters show what they are now, on every rank.

        Args:
            changes: What users have done to them.
            updated: Bit mask of the parameters that have been updated since.
        """
        parts = self._parts
        parts.sync.copies.show_params()
        if changes:
            self._params.show({index for index in changes.params if not updated >> index & 1})

    # -- the update and after ----------------------------------------------------------------------

    def _update(self, agreed: AgreedInputs, factor: float, *, publishes: bool) -> None:
        """Update all parameters that have a gradient. Collective: every rank.

        Args:
            agreed: The inputs.
            factor: On the gradients.
            publishes: Whether to bring them to all nodes as well.
        """
        parts, kernel, averaged = self._parts, self._parts.backend.kernel, self.averaging.is_done
        mean_scale = 1.0 if averaged else parts.sync.reduction.mean_scale
        parts.rule.plan(agreed.present, agreed.hypers, factor / agreed.loss_scale, mean_scale)
        shards = parts.sync.averaged() if averaged else parts.sync.reduced()
        for shard in shards:  # reduce-scatter; on one node: where they lie
            plan = self._plan(shard)
            with parts.trace.span("update", shard), parts.memory.state.open(shard.shard) as state:
                kernel.update(shard.sources, shard.targets, state, plan)
            if publishes:
                parts.sync.publish(shard)  # all-gather, while the next shard is updated
        if publishes:
            parts.sync.complete()

    def _plan(self, shard: ReducedShard) -> UpdatePlan:
        """Return the segments and coefficients of a shard in this step."""
        dtype = compute_dtype(shard.plan.buffers.region.dtype)
        return UpdatePlan.of(self._parts.rule, shard.shard, shard.span, dtype)

    def _first_poisoned(self) -> int:
        """Return the first parameter that updates are known to have made inf or NaN."""
        parts = self._parts
        position = parts.backend.kernel.take_poisoned()
        if position == ALL_FINITE:
            return _NO_PARAM
        partition, block = parts.registry.partition, Span(position, position + CHUNK_NUMEL)
        owned = [(buffers, shard) for buffers in parts.memory.buffers for shard in buffers.shards]
        for buffers, shard in owned:  # other ranks write to what is behind
            for index, span in partition.params_in(shard.region, block.intersect(shard)):
                values = parts.backend.host(buffers.updated[buffers.local(span).slice])
                if not np.isfinite(values).all():
                    return index
        return _NO_PARAM

    def _name_of(self, index: int) -> str | None:
        return None if index == _NO_PARAM else self._parts.registry.bindings[index].name

    def _report(
        self,
        number: int,
        agreed: AgreedInputs,
        result: "_Result",
        seconds: Mapping[str, float],
    ) -> StepReport:
        parts, factor = self._parts, result.factor
        none = factor is None or not parts.registry.bindings
        return StepReport(
            step=number,
            grad_norm=result.norm,
            diverged=result.diverged,
            clip_factor=1.0 if factor is None else factor,
            skipped=factor is None,
            loss_scale=agreed.loss_scale * self.averaging.loss_scale,
            edited_grads=agreed.edited,
            num_updated=None if none else agreed.present.bit_count(),
            seconds=seconds,
            waited_s=parts.sync.waited_s + parts.grads.waited_s,
            copied_nbytes=result.copied_nbytes,
            sent_nbytes=parts.sync.traffic.nbytes,
            sent_messages=parts.sync.traffic.messages,
            late_nbytes=parts.grads.late_nbytes,
        )
