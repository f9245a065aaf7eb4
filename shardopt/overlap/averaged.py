"""Gradients that the ranks of a node average as backward goes: stage 2."""

import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import xxhash

from shardopt._typing import FloatArray, IntArray
from shardopt.comm.collectives import Collectives
from shardopt.comm.consensus import attempt
from shardopt.comm.exit_hook import mpi_is_usable
from shardopt.comm.node_memory.comparing import changed
from shardopt.errors import CallOrderError, HyperparamsError
from shardopt.layout.dtypes import has_master
from shardopt.layout.ring import plan_ring
from shardopt.layout.span import Span
from shardopt.overlap.ring import GradRing
from shardopt.params.gradients import Gradients, RowGradients
from shardopt.params.inputs import mask_of
from shardopt.params.registry import Registry
from shardopt.store.memory import Memory
from shardopt.transport.reduction import Reduction
from shardopt.transport.ring import RingReduction

_READ = "p.grad, which needs as many backwards on all ranks"
_REMEDY = "Call zero_grad() on all ranks and repeat the backward passes"


class AveragedGradients:
    """Hands gradients to a ring as backward computes them; see ``Gradients``.

    [Note: what p.grad is in stage 2]
    After backward ``p.grad`` is the average over all ranks: a private view of the node's row. It
    waits, when it is first used, for ranks that are behind. Another tensor that a user puts there
    is this rank's own gradient, and is averaged by the step. The view may be written to, alike on
    all ranks, between the last backward and the step: pages that were written are found then,
    compared between ranks, and adopted. ``zero_grad`` forgets averages, and so does it to set every
    ``p.grad`` to None. What cannot be followed raises in the step, on all ranks: views written, and
    some gradients replaced or removed, before another backward.

    Args:
        registry: The parameters of this rank.
        memory: Their memory.
        reduction: Sums.
        collectives: For waits.
        ring_nbytes: As in ``ShardPolicy``.
    """

    are_averages = True

    def __init__(
        self,
        registry: Registry[Any],
        memory: Memory,
        reduction: RingReduction,
        collectives: Collectives,
        ring_nbytes: int | None,
    ) -> None:
        self.late_nbytes, self.waited_s = 0, 0.0
        self._registry, self._memory, self._reduction = registry, memory, reduction
        self._collectives, self._ring_nbytes = collectives, ring_nbytes
        self._pid = os.getpid()
        self._ring: GradRing | None = None
        self._step = 0
        self._averaged: set[int] = set()  # parameters with averages to which this rank contributed
        self._zeroed: list[int] = []  # the round after which averages were forgotten last
        self._changed: list[str] = []  # parameters whose gradients were replaced or removed
        self._written: list[tuple[int, Span, int]] = []
        self._error: Exception | None = None
        self._is_read = False
        self._has_met = False  # other ranks, who may have averages, since all were forgotten
        adapter = registry.adapter
        adapter.on_grad_ready(self._on_grad)
        adapter.on_backward_ends(self._on_start, self._on_end)
        adapter.on_grad_read(self._on_read)

    # -- the layout --------------------------------------------------------------------------------

    def check(self, dtype: str) -> None:
        """See ``Gradients.check``: 16 bits do not hold an average."""
        if has_master(dtype):
            raise HyperparamsError(
                f"policy.stage must be 1 for parameters of 16 bits; got 2 with {dtype}. Leave it "
                "out: stage 1 works."
            )

    def leave(self, step: int) -> None:
        """See ``Gradients.leave``."""
        if self._ring is None:
            return
        self._meet(step, has_more=False)
        bindings = self._registry.bindings
        mine = mask_of(index for index in self._averaged if bindings[index].holds_grad())
        self._memory.publish()
        masks = self._collectives.allgather(mine, step, "gradients")  # each has all of its sums now
        self._memory.acquire()
        for index, binding in enumerate(bindings):
            if any(mask >> index & 1 for mask in masks) and not binding.has_own_grad():
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
        elif self._averaged and (found := self._find_writes()):
            name = bindings[found[0][0]].name
            self._note(f"that of {name!r} was written to before another backward")

    def _on_grad(self, param: Any) -> None:
        """Hand over a gradient that backward has computed, and show the average in its place."""
        index = self._registry.index_of(param)
        if index is None or self._ring is None or not mpi_is_usable(self._pid):
            return
        binding = self._registry.bindings[index]
        grad = self._registry.adapter.grad(param, binding.name)
        if grad is None or grad.dtype != binding.grad.dtype or grad.shape != binding.grad.shape:
            return  # the step reports it
        self._ring.put(index, grad)
        self._averaged.add(index)
        binding.bind_grad()

    def _on_end(self) -> None:
        """Complete a round."""
        if self._ring is not None and mpi_is_usable(self._pid):
            self._ring.end_backward()

    def _on_read(self) -> None:
        """Wait until the averages that a user looks at are complete."""
        ring = self._ring
        if self._is_read or ring is None or not mpi_is_usable(self._pid):
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
        self._changed = [registry.bindings[index].name for index in gone]
        self._reduction.replace([(self._span(index), None) for index in gone])
        self._averaged.difference_update(gone)
        if has_more:
            for index, grad in own.items():
                self._ring.put(index, grad)
                self._averaged.add(index)
            self._meet(step, has_more=False)
            for index in own:
                registry.bindings[index].bind_grad()
        written, more = attempt(self._find_writes, {*gone, *own})
        self._written = written or []
        self.late_nbytes, self._ring.late_nbytes = self._ring.late_nbytes, 0
        self.waited_s, self._ring.waited_s = self._ring.waited_s, 0.0
        for found in (self._error, error, more):
            if found is not None:
                raise found
        copied_nbytes = sum(grad.nbytes for grad in own.values())
        return mask_of(self._averaged), copied_nbytes

    def describe(self, loss_scale: float) -> Mapping[str, object]:
        """See ``Gradients.describe``."""
        digests: dict[int, list[int]] = {}
        for index, span, digest in self._written:
            digests.setdefault(index, []).extend((span.start, span.stop, digest))
        names = {index: self._registry.bindings[index].name for index in digests}
        written = {
            f"what was written to the gradient of {names[i]!r}": d for i, d in digests.items()
        }
        return {
            "loss_scale": loss_scale,
            "the number of backward passes before zero_grad()": self._zeroed,
            "the parameters whose averaged gradients were replaced or removed": self._changed,
            "the parameters whose averaged gradients were written to": list(names.values()),
            **written,
        }

    def adopt_writes(self, present: int) -> None:
        """See ``Gradients.adopt_writes``."""
        views: list[tuple[Span, FloatArray | None]] = []
        for index, span, _ in self._written:
            own = self._registry.bindings[index].grad.reshape(-1)
            views.append((span, own[span.shift(-self._span(index).start).slice]))
        self._reduction.replace(views)
        for _, view in self._memory.averages:
            view.refresh()
        self._written, self._zeroed = [], []
        for index, binding in enumerate(self._registry.bindings):
            if present >> index & 1 and index not in self._averaged:  # other ranks had one
                self._averaged.add(index)
                binding.bind_grad()

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
        if self._ring is not None:
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
        ring.end_segment(has_more=has_more)
        self._collectives.wait(ring.is_over, step, "gradients", lambda: ring.late_ranks)
        return ring.has_more()

    def _restart(self) -> None:
        """Forget all averages, and what was written into them."""
        ring, adapter = self._ring, self._registry.adapter
        adapter.end_backward()
        self._error = None
        if ring is not None and (self._averaged or self._zeroed or self._has_met):
            ring.restart()
            self._has_met = False
            self._zeroed = [ring.num_rounds]
            self._averaged.clear()
        for _, view in self._memory.averages:
            view.find_writes()
            view.refresh()

    def _find_own(self) -> dict[int, FloatArray]:
        """Return the gradients that are not views of averages.

        Raises:
            PartitionError: One does not fit.
        """
        self._registry.adapter.end_backward()
        own = {}
        for index, binding in enumerate(self._registry.bindings):
            _, array = binding.find_new_grad()
            if array is None and index not in self._averaged and binding.holds_grad():
                array = binding.grad  # an average of an earlier step that the user has put back
            if array is not None:
                own[index] = array.copy() if self._registry.may_be_shared(array) else array
        return own

    def _is_view(self, index: int) -> bool:
        """Whether a gradient that is not the average lies in its memory all the same."""
        binding = self._registry.bindings[index]
        array, _ = attempt(self._registry.adapter.grad, binding.param, binding.name)
        return array is not None and self._registry.may_be_shared(array)

    def _find_writes(self, replaced: Collection[int] = ()) -> list[tuple[int, Span, int]]:
        """Return what this rank has written into averages.

        Args:
            replaced: Parameters with other gradients, or none: what written pages have of theirs
                is old.

        Returns:
            The parameter, which part of the flat index space, and a hash of the values there.
        """
        found: list[tuple[int, Span, int]] = []
        partition = self._registry.partition
        for region, (layout, view) in enumerate(self._memory.averages):
            pages = view.find_writes()
            if not pages:
                continue
            (array,) = layout.arrays
            spans: IntArray = np.array([(p.start, p.stop) for p in pages], np.int64)
            start = partition.regions[region].start
            for page in spans[changed(view.view, view.shared, spans)].tolist():
                first, stop = ((byte - array.start) // array.itemsize for byte in page)
                within = Span(max(0, first), min(array.numel, stop)).shift(start)
                for index, span in partition.params_in(region, within):
                    if index in replaced:
                        continue
                    own = self._registry.bindings[index].grad.reshape(-1)
                    values = own[span.shift(-partition.params[index].start).slice]
                    found.append((index, span, xxhash.xxh3_64_intdigest(values.data)))
        return found

    def _span(self, index: int) -> Span:
        """Return where a parameter is in the flat index space."""
        return self._registry.partition.params[index]


def make_gradients(
    registry: Registry[Any],
    memory: Memory,
    reduction: Reduction,
    collectives: Collectives,
    ring_nbytes: int | None,
) -> Gradients:
    """Return the way that gradients take to the kernel: by rows, or averaged in backward.

    Args:
        registry: The parameters of this rank.
        memory: Their memory.
        reduction: Sums.
        collectives: For waits.
        ring_nbytes: As in ``ShardPolicy``.
    """
    if isinstance(reduction, RingReduction):
        return AveragedGradients(registry, memory, reduction, collectives, ring_nbytes)
    return RowGradients(registry)
