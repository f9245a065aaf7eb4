"""The optimizer state as users see it: views to read, and writes that the next step takes over."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from shardopt._typing import FloatArray
from shardopt.backends.codes import put_values
from shardopt.core.array_memory import is_same_memory, overlaps_any
from shardopt.core.parts import Parts
from shardopt.core.shown_counts import ShownCounts
from shardopt.core.state_copies import DecodedCopies
from shardopt.core.state_dict import (
    PART_KEY,
    OptimizerState,
    StateDict,
    has_entry,
    packed_groups,
)
from shardopt.core.state_edits import (
    COUNT_KEYS,
    RESET_KEY,
    HandedOut,
    StateNotes,
    bits_of,
    changed_counts,
)
from shardopt.core.state_home import StateAtHome
from shardopt.core.state_mapping import ABSENT, ON_DEMAND, Entry, State
from shardopt.core.state_parsing import AS_STATE, parse_entry, parse_step_count, require
from shardopt.errors import CheckpointError, PartitionError
from shardopt.params.writes import UserWrites, Written
from shardopt.rule.coefficients import StepCount


class StateView:
    """The state of all parameters for this rank's user; it costs nothing before it is asked for.

    Args:
        parts: The optimizer's.
        writes: Finds what this rank's user writes into arrays.

    Attributes:
        home: The arrays.
        stored: What users have seen of it, once they have.
        counts: The step counts as they see them.
        notes: What they have done to entries since the last step.
    """

    def __init__(self, parts: Parts, writes: UserWrites) -> None:
        self._parts = parts
        self.home = StateAtHome(parts, writes)
        self.stored: State | None = None
        self.counts = ShownCounts(parts.registry.adapter.step_dtype, parts.registry.rule.count_keys)
        self._shown: tuple[int, int] | None = None  # the version and number of shown step counts
        self.notes = StateNotes()
        self._step_counts: tuple[int, list[StepCount]] = -1, []
        self._handed_out = HandedOut()
        self._copies = DecodedCopies()

    # -- what users see ----------------------------------------------------------------------------

    @property
    def mapping(self) -> State:
        """The entries of all parameters."""
        if self.stored is None:
            self.stored = State(owner=self)
        self.refresh()
        return self.stored

    def refresh(self) -> None:
        """Update the step counts in entries, and add entries of new parameters."""
        bindings, rule = self._parts.registry.bindings, self._parts.rule
        now = rule.version, len(bindings)
        if self.stored is None or self._shown == now:
            return
        counts, self._shown = rule.step_counts, now
        self.counts.show(counts)
        for index, (binding, count) in enumerate(zip(bindings, counts, strict=True)):
            if index not in self.notes.expected and has_entry(binding.param, count):
                self.notes.expected.add(index)
                if self.stored.peek(binding.param) is ABSENT:
                    self.stored.put(binding.param, None)

    def show(self, param: Any, key: Any) -> Any:
        """See ``state_mapping.Owner``."""
        self.refresh()
        if key in COUNT_KEYS:
            return None
        self.home.bring()
        registry = self._parts.registry
        index = registry.index_of(param)
        if index is None or not self.home.is_whole:
            return None
        spec = registry.partition.params[index].spec
        if not any(each.key == key and each.codec for each in spec.state):
            return None
        return self._as_shown(index, key, self.home.arrays(index)[key], spec.shape)

    def _as_shown(
        self, index: int, key: str, array: FloatArray, shape: tuple[int, ...] | None
    ) -> Any:
        """Return an array of the state of a parameter as its framework has it.

        Args:
            index: Number of the parameter.
            key: Name of the array.
            array: The array, flat.
            shape: That it is to have; None for a part of it.
        """
        registry, version = self._parts.registry, self._parts.rule.version
        spec = registry.partition.params[index].spec
        is_copy = any(each.key == key and each.codec for each in spec.state)
        if is_copy and (found := self._copies.find(index, key, version)) is not None:
            return found
        like = None if shape is None else registry.bindings[index].param
        shaped = array if shape is None else array.reshape(shape)
        value = registry.adapter.from_array(shaped, like)
        if is_copy:
            self._copies.add(index, key, spec, value, array)
        return value

    def rearrange(self, moves: Mapping[int, int]) -> None:
        """Follow parameters to their new numbers.

        Args:
            moves: The new number of each parameter that stays, by the number so far.
        """
        self._copies.forget()
        self.counts.rearrange(moves)
        self.notes.rearrange(moves)
        self._shown, self._step_counts = None, (-1, [])

    def entry_of(self, param: Any) -> Entry:
        """Return an entry for a parameter; an empty one if its own is gone or does not exist yet.

        Raises:
            KeyError: The parameter is not the optimizer's.
        """
        registry = self._parts.registry
        index = registry.index_of(param)
        is_pending = index is None and any(param is each for each in registry.pending())
        if self.stored is None or (index is None and not is_pending):
            raise KeyError("not a parameter of this optimizer")
        is_gone = index is None or self.stored.peek(param) is ABSENT
        values = {} if index is None or is_gone else self._values(index)
        missing = None
        if not self.home.is_whole:
            missing = (
                f"each {self.home.part[0]} has a part of it. Call gather_state_dict() for the "
            )
            missing += "whole, or shardopt.checkpoint.save"
        return Entry(values, self, param, missing)

    def note_write(self, param: Any) -> None:
        """See ``state_mapping.Owner``."""
        index = self._parts.registry.index_of(param)
        if index is not None:
            self.notes.dirty[index] = None
        elif not any(param is each for each in self.notes.surplus):
            self.notes.surplus.append(param)

    def assign(self, entries: Mapping[Any, Any]) -> None:
        """Put other entries in the place of all."""
        mapping, new = self.mapping, dict(entries)
        for param in list(mapping):
            if param not in new:
                del mapping[param]
        mapping.update(new)

    def reset(self, params: Iterable[Any] | None) -> None:
        """Remove the entries of some parameters, or of all: they start anew at the next step.

        Raises:
            PartitionError: One is not the optimizer's.
        """
        registry = self._parts.registry
        chosen = list(params or ())
        if params is None:
            chosen = [*(binding.param for binding in registry.bindings), *self.notes.surplus]
        elif {id(p) for p in chosen if registry.index_of(p) is None} - set(
            map(id, registry.pending())
        ):
            raise PartitionError(
                "params must be parameters of this optimizer; got another one. Leave them out to "
                "reset all."
            )
        for param in chosen:
            self.mapping.pop(param, None)

    def state_dict(self, state: OptimizerState) -> StateDict:
        """Return the node's part of a state, as this rank's user sees it; [Note: state dicts].

        Raises:
            CheckpointError: An entry of ``opt.state`` has been changed into something else.
        """
        registry = self._parts.registry
        counts, entries = changed_counts(self._parts.rule.step_counts, self.find_edits()), {}
        self.home.bring()
        for number, param in enumerate(state.params):  # edits of groups may be pending
            index = registry.index_of(param)
            if index is None:
                assigned = ABSENT if self.stored is None else self.stored.peek(param)
                if isinstance(assigned, Mapping) and assigned:
                    entries[number] = dict(assigned.items())
            elif index not in self.notes.resets and has_entry(param, counts[index]):
                entries[number] = self._shown_entry(index, counts[index], state)
        part: StateDict = {}
        if not self.home.is_whole:
            _, number, count = self.home.part
            part = {PART_KEY: {"node": number, "num_nodes": count}}
        return {"state": entries, "param_groups": packed_groups(state.groups), **part}

    def _shown_entry(self, index: int, count: StepCount, state: OptimizerState) -> StateDict:
        """Return the entry of a parameter in a state dict."""
        entry = state.new_entry(count)
        shape = None
        if self.home.is_whole:
            shape = state.partition.params[index].spec.shape
        else:
            entry["slices"] = [(run.start, run.stop) for run in self.home.places()[index].runs]
        for key, array in self.home.arrays(index).items():
            entry[key] = self._as_shown(index, key, array, shape)
            self._handed_out.add(entry[key], self._parts.rule.version)
        return entry

    def release(self) -> None:
        """Leave users with what they hold: dicts like any other, with the values that they have."""
        if self.stored is not None:
            self.stored.detach()
            self.stored = None

    # -- views that were handed out ----------------------------------------------------------------

    def admit(
        self, value: Any, array: FloatArray, part: Written, step: int
    ) -> tuple[FloatArray, bool]:
        """See ``state_parsing.Views``."""
        views = [piece.view for _, piece in self._parts.memory.pieces]
        if not any(np.may_share_memory(array, view) for view in views):
            return array, False
        rule = self._parts.rule
        if self._step_counts[0] != rule.version:
            self._step_counts = rule.version, rule.step_counts
        present = self._step_counts[1][part.param].step
        is_current = self._handed_out.is_current(value, rule.version)
        if is_current is False or (is_current is None and step != present):
            raise CheckpointError(
                "state_dict must be of the present step if it shows this very optimizer; got one "
                f"of step {step}, whose arrays show step {present} by now. Take a deepcopy when "
                "you save it: copy.deepcopy(opt.state_dict())."
            )
        is_in_place = is_same_memory(array, self.home.arrays(part.param)[part.key])
        return array if is_in_place else array.copy(), is_in_place

    # -- what users have done ----------------------------------------------------------------------

    def find_edits(self) -> dict[Written, int]:
        """Find what this rank's user has done to entries since the last step.

        Arrays that were put there are copied into the views. Nothing is forgotten before ``adopt``
        or ``forget``, so this may be called again.

        Raises:
            CheckpointError: An entry has been changed into something else.
        """
        registry = self._parts.registry
        self._copies.require_unwritten()
        if self.stored is None:
            return {}
        if self.notes.dirty or self.notes.surplus:
            self._take_over(self.stored)
        edits = {Written(index, RESET_KEY): 0 for index in sorted(self.notes.resets)}
        for edit in self.counts.edited():
            if edit.param not in self.notes.resets:
                values = self.counts.values(edit.param)
                parse_step_count(values, registry.bindings[edit.param].name)
                edits[edit] = bits_of(values[edit.key])
        return edits

    def adopt(self, edits: Mapping[Written, int]) -> None:
        """Make the edits that all ranks have agreed on, to what this rank owns."""
        if not edits:
            return
        parts = self._parts
        resets = {index for index, key in edits if key == RESET_KEY}
        counts = changed_counts(parts.rule.step_counts, edits)
        for _, arrays in self.home.owned(resets):
            for array in arrays.values():
                array[:] = 0
        self.home.send_out(resets)
        parts.rule.set_step_counts(counts)
        self.notes.expected -= resets
        self.notes.resets -= resets
        if self.stored is not None:
            for index in resets:
                self.stored.discard(parts.registry.bindings[index].param)
                self.counts.forget(index)
            self.refresh()

    def forget(self) -> None:
        """Drop what this rank's user has done: other values are there now."""
        if self.stored is None:
            return
        for index in [*self.notes.dirty, *self.notes.resets]:
            param = self._parts.registry.bindings[index].param
            self.stored.discard(param)
            if index in self.notes.expected:
                self.stored.put(param, None)
        for param in self.notes.surplus:
            self.stored.discard(param)
        self.notes.dirty.clear()
        self.notes.resets.clear()
        self.notes.surplus.clear()
        for edit in self.counts.edited():
            self.counts.forget(edit.param)

    # -- inside ------------------------------------------------------------------------------------

    def _values(self, index: int) -> dict[str, Any]:
        """Return the values of an entry."""
        registry = self._parts.registry
        adapter = registry.adapter
        counts = self.counts.values(index)
        values = {key: adapter.from_array(count, None) for key, count in counts.items()}
        if self.home.is_whole:
            spec, kept = registry.partition.params[index].spec, self.home.kept(index)
            for each in spec.state:
                values[each.key] = ON_DEMAND
                if each.codec is None:
                    values[each.key] = self._as_shown(index, each.key, kept[each.key], spec.shape)
        return values

    def _take_over(self, mapping: State) -> None:
        """Copy what users have put into entries to where the state is."""
        registry = self._parts.registry
        bindings = registry.bindings
        pending = set(map(id, registry.pending())) if self.notes.surplus else set()
        left = [p for p in self.notes.surplus if p in mapping and id(p) not in pending]
        rule, got = "have entries for the parameters of this optimizer only", f"{left!r:.80}"
        require(not left, "opt.state", rule, got, AS_STATE)
        resets, changed = set(), {}
        state, is_whole = self.home.state, self.home.is_whole
        for index in self.notes.dirty:
            entry = mapping.peek(bindings[index].param)
            if entry is ABSENT or (isinstance(entry, Mapping) and not entry):
                resets |= {index} & self.notes.expected
            elif entry is not None:
                spec = registry.partition.params[index].spec
                group = registry.param_groups[spec.group]
                changed[index] = parse_entry(entry, spec, group, state, is_whole=is_whole)
        if changed:
            self.home.bring()  # what is left alone is to be as it is there
        views = [piece.view for _, piece in self._parts.memory.pieces]
        copies = [  # before anything is written, as they may be views of one another
            (kept[each.key], each, new.copy() if overlaps_any(new, views) else new)
            for index, (_, arrays) in changed.items()
            for kept in [self.home.kept(index)]
            for each in registry.partition.params[index].spec.state
            if each.key in arrays
            for new in [arrays[each.key]]
            if not is_same_memory(new, kept[each.key])
        ]
        for array, each, new in copies:
            put_values(array, each, new)
        if copies:
            self._copies.forget()
        for index, (numbers, _) in changed.items():
            counts = self.counts.values(index)
            for key, number in numbers.items():
                counts[key][...] = number
            entry, param = mapping.peek(bindings[index].param), bindings[index].param
            if isinstance(entry, Entry) and entry.is_of(self, param):
                entry.restore(self._values(index))
            else:
                mapping.put(param, None)
        self.notes.resets = (self.notes.resets - set(changed)) | resets
        self.notes.dirty.clear()
        self.notes.surplus = [param for param in self.notes.surplus if id(param) in pending]
