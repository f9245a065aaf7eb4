"""The optimizer state as users see it, when parameters come, leave, or get other numbers."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from shardopt.core.array_memory import overlaps_any
from shardopt.core.parts import Parts
from shardopt.core.state_mapping import ABSENT, Entry
from shardopt.core.state_parsing import parse_entry, require
from shardopt.core.state_view import StateView
from shardopt.params.planning import PlannedGroups

_ANEW = (
    "Leave it out, so that the parameter starts anew, or load a state with opt.load_state_dict() "
    "once it is taken over"
)


class StateMoves:
    """Takes along what users see of the state, and what they have done to it.

    Args:
        parts: The optimizer's.
        view: What users see.
    """

    def __init__(self, parts: Parts, view: StateView) -> None:
        self._parts = parts
        self._view = view
        self._left: WeakValueDictionary[int, Any] = WeakValueDictionary()  # with state

    # -- before anything changes -------------------------------------------------------------------

    def check_added(self, planned: PlannedGroups) -> None:
        """Read the entries that users have assigned to parameters that are about to be added.

        What they have put there may be views of state that is about to be let go.

        Raises:
            CheckpointError: One does not fit, or ranks do not have the whole state.
        """
        assigned = {i: self._assigned(param) for i, param in planned.added.items()}
        views = []
        if any(entry is not None for entry in assigned.values()):
            views = [piece.view for _, piece in self._parts.memory.pieces]
        for index, param in planned.added.items():
            entry = assigned[index]
            if entry is None or self._view.stored is None:
                continue
            spec = planned.partition.params[index].spec
            rule = "be left out for a new parameter on several nodes, which have a part of it each"
            if self._parts.topology.num_nodes == 1:
                rule = "be left out for a new parameter where each rank has a part of it"
            require(
                self._view.home.is_whole, f"opt.state of {spec.name!r}", rule, "an entry", _ANEW
            )
            group = planned.groups[spec.group - planned.first_group]
            numbers, arrays = parse_entry(entry, spec, group, self._view.home.state, is_whole=True)
            own = {k: a.copy() if overlaps_any(a, views) else a for k, a in arrays.items()}
            shaped = {key: array.reshape(spec.shape) for key, array in own.items()}
            self._view.stored.put(param, {**numbers, **shaped})

    def refuse(self, leaving: Iterable[Any]) -> None:
        """Drop what users have done to the state along with an edit that is not taken over.

        Args:
            leaving: The parameters that were to leave.
        """
        stored, notes = self._view.stored, self._view.notes
        if stored is None:
            return
        for param in notes.surplus:
            stored.discard(param)
        notes.surplus.clear()
        for param in leaving:
            index = self._parts.registry.index_of(param)
            if index in notes.expected and stored.peek(param) is ABSENT:
                stored.put(param, None)
                notes.dirty.pop(index, None)
                notes.resets.discard(index)

    def find_lost(self, planned: PlannedGroups) -> list[str]:
        """Note which parameters leave with state that nobody has taken out.

        Returns:
            The names of those that come back without state that they once left with.
        """
        registry, stored, params = (
            self._parts.registry,
            self._view.stored,
            planned.partition.params,
        )
        counts = self._parts.rule.step_counts if planned.leaving else []
        for index in planned.leaving:
            param = registry.bindings[index].param
            is_taken = stored is not None and stored.peek(param) is ABSENT
            if counts[index].step and not is_taken:
                with suppress(TypeError):  # not every class can be referred to weakly
                    self._left[id(param)] = param
        back = [i for i, p in planned.added.items() if self._left.pop(id(p), None) is p]
        return [params[i].spec.name for i in back if self._assigned(planned.added[i]) is None]

    # -- the change --------------------------------------------------------------------------------

    def take_over(self, planned: PlannedGroups) -> None:
        """Follow parameters to the numbers that they have by now."""
        view, registry = self._view, self._parts.registry
        if view.stored is None:
            return
        if planned.kept_regions is not None:
            view.rearrange(planned.moves)
        for departure in planned.departures:
            entry = view.stored.peek(departure.binding.param)
            if isinstance(entry, Entry):
                entry.detach()
            view.stored.discard(departure.binding.param)
        for index, param in planned.added.items():
            if self._assigned(param) is None:
                view.stored.discard(param)  # an empty entry, from a look at it before
            else:
                view.notes.dirty[index] = None
        surplus = view.notes.surplus
        view.notes.surplus = [p for p in surplus if registry.index_of(p) is None]
        view.refresh()

    # -- inside ------------------------------------------------------------------------------------

    def _assigned(self, param: Any) -> Mapping[Any, Any] | None:
        """Return the entry that a user has assigned to a parameter that is not known, if any."""
        stored = self._view.stored
        entry = None if stored is None else stored.peek(param)
        return None if entry is ABSENT or not entry else entry
