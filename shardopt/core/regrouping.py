"""The parameters of an optimizer come, leave, and move between param groups.

[Note: edited param groups]
Users edit ``param_groups`` as they do in torch: lists of parameters, the list of groups, or another
list in its place. The next call of all ranks takes the edit over, before it does anything else: it
plans, agrees and allocates first, so that an edit that cannot be made leaves everything as it was,
and the groups known before are put back. Parameters that stay do not move, nor does their state:
nothing is copied or sent, on any number of nodes. New ones get regions of their own, as those of
``add_param_group`` do. Those that leave get memory of their own before theirs is given back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardopt._typing import FloatArray
from shardopt.backends.base import is_on_device
from shardopt.combinations import why_not_dtype
from shardopt.comm.consensus import Description, Outcome, attempt
from shardopt.comm.node_memory.limits import Demand, memory_shortage
from shardopt.comm.waiting import deadline
from shardopt.core.parts import Parts
from shardopt.core.shared_params import SharedParams
from shardopt.core.state_moves import StateMoves
from shardopt.core.state_view import StateView
from shardopt.errors import SharedMemoryError
from shardopt.layout.dtypes import wire_dtype_of, wire_of
from shardopt.layout.footprint import plan_node_need
from shardopt.layout.span import Span
from shardopt.params.binding import Binding
from shardopt.params.groups import Group
from shardopt.params.known_groups import params_in
from shardopt.params.planning import PlannedGroups, describe_groups, plan_added, plan_edited
from shardopt.store.memory import RegionMemory

_SMALL_NBYTES = 1 << 20


@dataclass(frozen=True)
class RegroupCall:
    """A call of all ranks that changes which parameters there are.

    Attributes:
        name: The user's call, for messages.
        step: The last step.
        settings: What must be equal on all ranks besides.
    """

    name: str
    step: int
    settings: Description


class Regrouping:
    """Makes the parameters of an optimizer those of other groups.

    Args:
        parts: The optimizer's.
        params: Its parameters in the memory of every node.
        view: Its state as users see it.
    """

    def __init__(self, parts: Parts, params: SharedParams, view: StateView) -> None:
        self._parts = parts
        self._params = params
        self._states = StateMoves(parts, view)
        self._view = view

    def add(self, call: RegroupCall, groups: Outcome[list[Group]]) -> None:
        """Add groups behind the present ones.

        Collective: every rank.

        Args:
            call: The call.
            groups: The new groups, complete with every hyperparameter, or the error met in making
                them.
        """

        def plan() -> PlannedGroups:
            if groups.error is not None:
                raise groups.error
            assert groups.value is not None
            return plan_added(groups.value, self._parts.registry)

        self._parts.grads.leave(call.name, call.step)
        planned, error = attempt(self._plan, plan)
        regions = self._prepare(call, planned, error)
        assert planned is not None
        self._carry_out(call, planned, regions)

    def take_over(self, call: RegroupCall, defaults: Mapping[str, Any]) -> list[str]:
        """Take over groups that users have edited; see [Note: edited param groups].

        Collective: every rank.

        Args:
            call: The call.
            defaults: Hyperparameters for groups that lack some.

        Returns:
            The names of parameters that have come back without the state that they once had.
        """
        registry = self._parts.registry
        try:
            self._parts.grads.leave(call.name, call.step)
            planned, error = attempt(self._plan, lambda: plan_edited(registry, defaults))
            regions = self._prepare(call, planned, error)
        except Exception:
            stay = {id(param) for param in params_in(registry.param_groups)}
            leaving = [b.param for b in registry.bindings if id(b.param) not in stay]
            self._states.refuse(leaving)
            registry.restore_groups()
            raise
        assert planned is not None
        return self._carry_out(call, planned, regions)

    # -- before anything changes -------------------------------------------------------------------

    def _plan(self, plan: Any) -> PlannedGroups:
        """Lay out groups, and compile what new parameters need."""
        parts = self._parts
        planned: PlannedGroups = plan()
        self._states.check_added(planned)
        node_size, num_nodes = parts.topology.node_size, parts.topology.num_nodes
        several = num_nodes > 1
        specs = [planned.partition.params[index].spec for index in planned.added]
        for dtype, form in {(spec.dtype, spec.form) for spec in specs}:
            wire = wire_dtype_of(dtype, node_size, wire_of(parts.policy)) if several else None
            if (refused := why_not_dtype(parts.policy, parts.job, dtype)) is not None:
                raise refused
            parts.backend.kernel.prepare(dtype, wire, num_nodes, form)
        return planned

    def _prepare(
        self, call: RegroupCall, planned: PlannedGroups | None, error: Exception | None
    ) -> list[RegionMemory]:
        """Have all ranks agree, and allocate the regions of new parameters. Collective."""
        parts, step = self._parts, call.step
        enter = parts.consensus.enter_call
        description = {**call.settings, **describe_groups(planned, self._parts.registry.rule)}
        enter(call.name, description, error, step=step)
        assert planned is not None
        enter(call.name, {}, self._shortage(planned), step=step)

        def allocate() -> list[RegionMemory]:
            numbers = _new_regions(planned)
            return [parts.memory.allocate(planned.partition, number) for number in numbers]

        with deadline(parts.policy.timeout_s, call.name, parts.failure):
            regions, error = attempt(allocate)
        enter(call.name, {}, error, step=step)
        assert regions is not None
        return regions

    def _shortage(self, planned: PlannedGroups) -> SharedMemoryError | None:
        """Return an error if the memory of new parameters cannot be had on the node.

        That of leaving ones has been taken already.
        """
        topology, adapter = self._parts.topology, self._parts.registry.adapter
        trained = {index: adapter.requires_grad(p) for index, p in planned.added.items()}
        regions = _new_regions(planned)
        num_rows, grads = topology.node_size, self._parts.grads
        if grads.are_averages or grads.are_updates:  # one, if any
            num_rows = int(grads.are_averages and topology.num_nodes == 1)
        need = plan_node_need(planned.partition, topology.node, regions, trained, num_rows)
        if need.least_nbytes < _SMALL_NBYTES:  # thousands of small optimizers are made quickly
            return None
        return memory_shortage(Demand(topology.node_size, need.least_nbytes, need.view_nbytes))

    # -- the change --------------------------------------------------------------------------------

    def _carry_out(
        self, call: RegroupCall, planned: PlannedGroups, regions: Sequence[RegionMemory]
    ) -> list[str]:
        """Make the change that all ranks have agreed on. Collective."""
        parts, step = self._parts, call.step
        parts.overlap.settle(step)
        emptied, rows = self._emptied(planned)
        for departure in planned.departures:
            departure.binding.leave(departure)
        lost, bindings = self._states.find_lost(planned), self._switch(planned, regions)
        with deadline(parts.policy.timeout_s, call.name, parts.failure):
            parts.grads.lay_out()
        self._activate(step)
        is_edit = planned.kept_regions is not None
        first_region = _new_regions(planned).start
        self._params.initialize(bindings, first_region, step, none_is_zero=not is_edit)
        for array in emptied:  # once new parameters, which may be views of it, are elsewhere
            if is_on_device(array):
                parts.residence.holder.zero(array)
            else:
                array[...] = 0
                parts.memory.arena.trim(array)
        if is_edit:
            parts.residence.send_grads([*rows, *([] for _ in regions)])
        for departure in planned.departures:
            departure.binding.forget()
        if is_edit:
            with deadline(parts.policy.timeout_s, call.name, parts.failure):
                parts.memory.arena.reclaim()
        parts.start_step(step + 1)
        return lost

    def _emptied(self, planned: PlannedGroups) -> tuple[list[FloatArray], list[list[Span]]]:
        """Find what this rank must zero of what leaves regions that stay: all but parameters.

        See [Note: padding stays zero].

        Returns:
            The arrays, at home and on devices; and for each region that stays, with its new number,
            the spans whose gradients are zeros then.
        """
        partition, bindings = self._parts.registry.partition, self._parts.registry.bindings
        kept = set(planned.kept_regions or ())
        leaving = {index for index in planned.leaving if partition.params[index].region in kept}
        live = [index for index in sorted(leaving) if bindings[index].is_live]
        runs = self._parts.memory.local_runs(partition, sum(1 << index for index in live))
        rows = [runs[number] for number in planned.kept_regions or ()]
        if not leaving:
            return [], rows
        memory, residence = self._parts.memory, self._parts.residence
        arrays = [bindings[index].grad for index in live]
        for _, state in self._view.home.owned(leaving):
            arrays += state.values()
        for buffers in memory.buffers:
            for shard in buffers.shards:
                for index, _, local in partition.owned_params([shard]):
                    if index not in leaving:
                        continue
                    if not residence.updates_home:
                        arrays += memory.state.part(shard, local).values()
                    if buffers.sums is not None and buffers.sums.is_allocated:
                        arrays += buffers.sums.part(shard, local).values()
        return arrays, rows

    def _switch(self, planned: PlannedGroups, regions: Sequence[RegionMemory]) -> list[Binding]:
        """Hand the new partition to all parts, and return the bindings of new parameters."""
        parts, partition, kept = self._parts, planned.partition, planned.kept_regions
        if kept is None:
            parts.memory.extend(regions)
            parts.sync.extend(partition, parts.memory.buffers)
            parts.rule.extend(partition)
        else:
            parts.memory.select(partition, kept)
            parts.memory.extend(regions)
            parts.sync.lay_out(partition, parts.memory.buffers)
            parts.rule.rearrange(partition, [m.source for m in planned.members])
        bindings = parts.registry.take(planned, parts.memory.buffers)
        self._states.take_over(planned)
        return bindings

    def _activate(self, step: int) -> None:
        """Have buckets exchanged that hold parameters which some rank trains. Collective."""
        parts = self._parts
        if parts.topology.num_nodes > 1:
            trained = parts.registry.mask_of_trained()
            for mask in parts.collectives.allgather(trained, step, "activate"):
                parts.sync.reduction.activate(mask)


def _new_regions(planned: PlannedGroups) -> range:
    """Return the numbers of the regions that are to be allocated, the last ones."""
    partition = planned.partition
    numbers = partition.regions_with(planned.added)
    return range(numbers[0] if numbers else len(partition.regions), len(partition.regions))
