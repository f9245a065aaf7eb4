"""Gradients that the ranks of a node average as backward goes: stage 2."""

import functools
import operator
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from shardopt._typing import FloatArray
from shardopt.comm.consensus import Consensus, attempt
from shardopt.comm.exit_hook import ExitHook, mpi_is_usable
from shardopt.errors import CallOrderError
from shardopt.layout.ring import plan_ring
from shardopt.layout.span import Span
from shardopt.overlap.average_edits import AverageEdits
from shardopt.overlap.progress import drain
from shardopt.overlap.ring import GradRing, advance_all
from shardopt.overlap.segments import PHASE, awaited_ranks, end_segment
from shardopt.params.gradients import UpdatedBySteps
from shardopt.params.inputs import mask_of
from shardopt.params.registry import Registry
from shardopt.store.memory import Memory
from shardopt.transport.ring import RingReduction
from shardopt.transport.sync import BucketSync

_CALLS = "step(), average_grads() or another call that needs all gradients"
_READ = "p.grad, which needs as many backwards on all ranks"
_REMEDY = "Call zero_grad() on all ranks and repeat the backward passes"


class AveragedGradients(UpdatedBySteps):
    """Hands gradients to a ring as backward computes them; see ``Gradients``.

    [Note: what p.grad is in stage 2]
    After backward ``p.grad`` is the average over all ranks: a private view of the node's row. It
    waits, when it is first used, for ranks that are behind. Another tensor that a user puts there
    is this rank's own gradient, and is averaged by the step. The view may be written to, alike on
    all ranks, between the last backward and the step: pages that were written are found then,
    compared between ranks, and adopted. ``zero_grad`` forgets averages, and so does it to set every
    ``p.grad`` to None. What cannot be followed raises in the step, on all ranks: views written, and
    some gradients replaced or removed, before another backward.

    On several nodes a rank has no more than the averages of its own shards. ``p.grad`` then raises
    when its elements are used, until ``show`` has filled the row of each node, which takes memory
    from then on. Another backward, or ``zero_grad``, hides averages again.

    Args:
        registry: The parameters of this rank.
        memory: Their memory.
        sync: Sums, and shows averages on all nodes.
        consensus: The ranks.
        ring_nbytes: As in ``ShardPolicy``.
    """

    are_averages = True

    def __init__(
        self,
        registry: Registry[Any],
        memory: Memory,
        sync: BucketSync,
        consensus: Consensus,
        ring_nbytes: int | None,
    ) -> None:
        self.late_nbytes, self.waited_s = 0, 0.0
        assert isinstance(sync.reduction, RingReduction)
        self._registry, self._memory, self._sync = registry, memory, sync
        self._reduction = sync.reduction
        self._has_others = consensus.topology.num_nodes > 1
        self._guard = sync.translate_mpi_errors if self._has_others else nullcontext[None]
        self._exit = ExitHook(self, drain, sync.reduction)
        self._consensus, self._collectives = consensus, consensus.collectives
        self._ring_nbytes = ring_nbytes
        self._pid = os.getpid()
        self._ring: GradRing | None = None
        self._step = 0
        self._averaged: set[int] = set()  # parameters with averages to which this rank contributed
        self._zeroed: list[int] = []  # the round after which averages were forgotten last
        self._changed: list[str] = []  # parameters whose gradients were replaced or removed
        self._edits = AverageEdits(registry, memory)
        self._error: Exception | None = None
        self._is_read = False
        self._sent = 0  # the position up to which sums of nodes have been exchanged
        self._has_met = False  # other ranks, who may have averages, since all were forgotten
        adapter = registry.adapter
        adapter.on_grad_ready(self._on_grad)
        adapter.on_backward_ends(self._on_start, self._on_end)
        adapter.on_grad_read(self._on_read)
        self._show(are_shown=False)

    # -- the layout --------------------------------------------------------------------------------

    def leave(self, call: str, step: int) -> None:
        """See ``Gradients.leave``."""
        if self._ring is None:
            return
        self._meet(step, has_more=False)
        self._consensus.enter_call(call, {}, None, step=step)  # others may have met in a step
        bindings = self._registry.bindings
        mine = mask_of(index for index in self._averaged if bindings[index].holds_grad())
        self._memory.publish()
        masks = self._collectives.allgather(mine, step, "gradients")  # each has all of its sums now
        self._memory.acquire()
        present = functools.reduce(operator.or_, masks)
        if present:
            self.show(present, step)
        for index, binding in enumerate(bindings):
            if present >> index & 1 and not binding.has_own_grad():
                binding.own_grad()
        self._restart()

    def lay_out(self) -> None:
        """See ``Gradients.lay_out``."""
        registry, partition = self._registry, self._registry.partition
        self._reduction.lay_out(partition)
        trained = registry.mask_of_trained()
        expected = [i for i in range(len(partition.params)) if trained >> i & 1]
        plan = plan_ring(partition, self._ring_nbytes)
        self._ring = GradRing(self._memory, partition, self._reduction, plan, expected)
        self._sent = 0

    # -- while backward runs -----------------------------------------------------------------------

    def _on_start(self) -> None:
        """Look for what users have done to averages before another backward adds to them."""
        if not mpi_is_usable(self._pid):
            return
        self._is_read = False
        bindings = self._registry.bindings
        gone = [index for index in self._averaged if not bindings[index].holds_grad()]
        names = ", ".join(repr(bindings[index].name) for index in sorted(gone)[:3])
        if gone and len(gone) == len(self._averaged):
            has_views = any(map(self._is_view, gone))
            self._restart()
            if has_views:
                self._note(f"those of {names} were replaced by views of them")
        elif gone:
            self._note(f"those of {names} were replaced or removed and others were not")
        elif self._averaged and self._are_shown and (found := self._edits.params(self._averaged)):
            name = bindings[min(found)].name
            self._note(f"that of {name!r} was written to before another backward")
        elif self._averaged and self._are_shown and self._reduction.holds_sums:
            self._note('average_grads(), whose averages take the place of sums (accumulate="node")')
        self._show(are_shown=False)

    def _on_grad(self, param: Any) -> None:
        """Hand over a gradient that backward has computed, and show the average in its place."""
        index = self._registry.index_of(param)
        if index is None or self._ring is None or not mpi_is_usable(self._pid):
            return
        binding = self._registry.bindings[index]
        grad = self._registry.adapter.grad(param, binding.name)
        if grad is None or grad.dtype != binding.data.dtype or grad.shape != binding.data.shape:
            return  # the step reports it
        with self._guard():
            self._ring.put(index, grad)
        self._averaged.add(index)
        binding.bind_grad()

    def _on_end(self) -> None:
        """Complete a round."""
        if self._ring is not None and mpi_is_usable(self._pid):
            with self._guard():
                self._ring.end_backward()

    def _on_read(self) -> None:
        """Wait until the averages that a user looks at are complete."""
        ring = self._ring
        if self._is_read or self._has_others or ring is None or not mpi_is_usable(self._pid):
            return
        if not ring.is_averaged():
            behind = ring.ranks_behind
            self._collectives.wait(ring.is_averaged, self._step + 1, _READ, behind)
        self._memory.acquire()
        self._is_read = True

    def _note(self, event: str) -> None:
        """Remember an error, for the step to raise on all ranks."""
        self._error = self._error or CallOrderError(
            f"gradients that are averaged must not be changed between backward passes; got a "
            f"backward after {event}. {_REMEDY}, or accumulate in ShardPolicy(stage=1)."
        )

    # -- around a step -----------------------------------------------------------------------------

    def take(self, step: int) -> tuple[int, int]:
        """See ``Gradients.take``."""
        self._step, self._is_read = step, False
        if self._ring is None:
            return 0, 0
        registry = self._registry
        own, error = attempt(self._find_own)
        own = own or {}
        gone = [i for i in sorted(self._averaged) if not registry.bindings[i].holds_grad()]
        if gone and len(gone) == len(self._averaged) and not own:
            self._restart()
            gone = []
        has_more = self._meet(step, has_more=bool(own))
        self._has_met = True
        if gone and len(gone) == len(self._averaged) and not registry.adapter.reports_grads:
            self._restart()  # nobody has told of the backward whose gradients took their places
            gone = []
        self._changed = [registry.bindings[index].name for index in gone]
        self._reduction.replace([(self._span(index), None) for index in gone])
        self._averaged.difference_update(gone)
        self._forget_factors((*gone, *own))
        if has_more:
            if self._are_shown and self._reduction.holds_sums and self._averaged:
                self._note('average_grads() and other gradients behind it (accumulate="node")')
            self._show(are_shown=False)
            if own:  # all of them in one round, as the sums of each are rounded by themselves
                self._ring.expect(own)
            for index in sorted(own, reverse=True):  # the order of travel
                self._ring.put(index, own[index])
                self._averaged.add(index)
            self._meet(step, has_more=False)
            for index in own:
                registry.bindings[index].bind_grad()
        more = attempt(self._edits.find, self._averaged, {*gone, *own}).error
        self.late_nbytes, self._ring.late_nbytes = self._ring.late_nbytes, 0
        self.waited_s, self._ring.waited_s = self._ring.waited_s, 0.0
        for found in (self._error, error, more):
            if found is not None:
                raise found
        self._edits.warn_of_copies()
        copied_nbytes = sum(grad.nbytes for grad in own.values())
        return mask_of(self._averaged), copied_nbytes

    def describe(self, loss_scale: float) -> Mapping[str, object]:
        """See ``Gradients.describe``."""
        return {
            "loss_scale": loss_scale,
            "the number of backward passes before zero_grad()": self._zeroed,
            "the parameters whose averaged gradients were replaced or removed": self._changed,
            **self._edits.describe(),
        }

    def adopt_writes(self, present: int) -> None:
        """See ``Gradients.adopt_writes``."""
        self._edits.apply(self._reduction)
        self._forget_factors(self._averaged)
        self._zeroed = []
        for index, binding in enumerate(self._registry.bindings):
            if present >> index & 1 and index not in self._averaged:  # other ranks had one
                self._averaged.add(index)
                binding.bind_grad()

    def show(self, present: int, step: int) -> None:
        """See ``Gradients.show``; on one node averages are where every rank sees them."""
        if not self._has_others:
            return
        self._sync.reduction.activate(present)
        self._sync.average(present, 1.0)
        self._memory.publish()
        self._consensus.barrier(step, "average_grads()")
        self._memory.acquire()
        self._show(are_shown=True)

    def zero(self, *, set_to_none: bool) -> None:
        """See ``Gradients.zero``; zeros are this rank's own until a backward adds to them."""
        self._restart()
        for binding in self._registry.bindings:
            if set_to_none:
                binding.remove_grad()
            elif binding.has_grad():
                binding.own_grad(zeros=True)

    def scale(self, factor: float) -> None:
        """Do nothing: ranks with different loss scales have been refused."""

    def free(self) -> None:
        """See ``Gradients.free``."""
        self._exit.cancel()
        if self._ring is not None:
            if self._has_others:  # who may wait for what this node sends
                self._meet(self._step + 1, has_more=False)
            self._ring.free()
            self._ring = None

    # -- inside ------------------------------------------------------------------------------------

    def _meet(self, step: int, *, has_more: bool) -> bool:
        """End a segment on all ranks of the node, with all averages; see ``GradRing``.

        Returns:
            Whether some rank has gradients for another segment.
        """
        ring = self._ring
        assert ring is not None
        total = end_segment(ring, self._consensus, step, _CALLS, has_more=has_more)
        if self._reduction.holds_sums and not ring.has_more() and total > self._sent:
            self._sent = total
            self._reduction.send_sums()
            behind = partial(awaited_ranks, ring, self._collectives.topology)
            self._collectives.wait(self._is_sent, step, PHASE, behind)
        return ring.has_more()

    def _is_sent(self) -> bool:
        """Whether this rank has all averages; makes progress."""
        advance_all()
        return self._reduction.is_idle

    def _show(self, *, are_shown: bool) -> None:
        """Note whether the node's row has averages; on one node it always has."""
        self._are_shown = are_shown or not self._has_others
        self._registry.adapter.note_averages(are_shown=self._are_shown)

    def _restart(self) -> None:
        """Forget all averages, and what was written into them."""
        ring, adapter = self._ring, self._registry.adapter
        adapter.end_backward()
        self._show(are_shown=False)
        self._error = None
        self._forget_factors(self._averaged)
        if ring is not None and (self._averaged or self._zeroed or self._has_met):
            ring.restart()
            self._has_met = False
            self._zeroed = [ring.num_rounds]
            self._averaged.clear()
        self._edits.forget()

    def _find_own(self) -> dict[int, FloatArray]:
        """Return the gradients that are not views of averages.

        Raises:
            CallOrderError: One was an average that is no more.
            PartitionError: One does not fit.
        """
        self._registry.adapter.end_backward()
        own = {}
        for index, binding in enumerate(self._registry.bindings):
            _, array = binding.find_new_grad()
            if array is None and index not in self._averaged and binding.holds_grad():
                if not self._are_shown:
                    raise CallOrderError(
                        "gradients must be averages of the present step, or tensors of your own; "
                        f"got an earlier p.grad for {binding.name!r}, of which nothing is left on "
                        f"several nodes with policy.stage=2. {_REMEDY}."
                    )
                binding.own_grad()  # an average of an earlier step that the user has put back
                array = self._registry.adapter.grad(binding.param, binding.name)
            if array is not None:
                own[index] = array.copy() if self._registry.may_be_shared(array) else array
        return own

    def _is_view(self, index: int) -> bool:
        """Whether a gradient that is not the average lies in its memory all the same."""
        binding = self._registry.bindings[index]
        array, _ = attempt(self._registry.adapter.grad, binding.param, binding.name)
        return array is not None and self._registry.may_be_shared(array)

    def _forget_factors(self, params: Iterable[int]) -> None:
        for index in params:
            self._registry.adapter.forget_factors(self._registry.bindings[index].param)

    def _span(self, index: int) -> Span:
        """Return where a parameter is in the flat index space."""
        return self._registry.partition.params[index]
