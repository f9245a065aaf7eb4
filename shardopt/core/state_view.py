"""The optimizer state as users see it: views to read, and writes that the next step takes over."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shardopt._typing import FloatArray
from shardopt.core.parts import Parts
from shardopt.core.state_dict import (
    PART_KEY,
    NodePart,
    OptimizerState,
    StateDict,
    has_entry,
    node_parts,
    packed_groups,
)
from shardopt.core.state_edits import (
    COUNT_KEYS,
    RESET_KEY,
    HandedOut,
    ShownCounts,
    bits_of,
    number_of,
)
from shardopt.core.state_mapping import ABSENT, Entry, State
from shardopt.core.state_parsing import parse_array, parse_step_count, require
from shardopt.errors import CheckpointError, PartitionError
from shardopt.layout.state_spec import state_specs
from shardopt.params.writes import Written
from shardopt.rule.nadam import Hyperparams, StepCount

_AS_STATE = "Put in what opt.state has there, or call opt.reset_state()"


class StateView:
    """The state of all parameters for this rank's user; it costs nothing before it is asked for.

    Args:
        parts: The optimizer's.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._mapping: State | None = None
        self._counts: list[ShownCounts] = []
        self._shown: tuple[int, int] | None = None  # the version and number of shown step counts
        self._expected: set[int] = set()  # parameters that have an entry unless a user removes it
        self._dirty: dict[int, None] = {}
        self._surplus: list[Any] = []
        self._resets: set[int] = set()
        self._places: tuple[object, list[NodePart]] = None, []  # of a partition
        self._step_counts: tuple[int, list[StepCount]] = -1, []
        self._handed_out = HandedOut()

    # -- what users see ----------------------------------------------------------------------------

    @property
    def mapping(self) -> State:
        """The entries of all parameters."""
        if self._mapping is None:
            self._mapping = State(owner=self)
        self.refresh()
        return self._mapping

    def refresh(self) -> None:
        """Bring step counts up to date, and add entries of new parameters."""
        bindings, rule = self._parts.registry.bindings, self._parts.rule
        now = rule.version, len(bindings)
        if self._mapping is None or self._shown == now:
            return
        counts, self._shown = rule.step_counts, now
        start = self._counts[-1].stop if self._counts else 0
        if start < len(bindings):
            dtypes = {"step": self._parts.registry.adapter.step_dtype, "mu_product": "float64"}
            new, shown = (
                {key: np.zeros(len(bindings) - start, dtype) for key, dtype in dtypes.items()}
                for _ in range(2)
            )
            self._counts.append(ShownCounts(start, new, shown))
        for chunk in self._counts:
            chunk.show(counts)
        for index, (binding, count) in enumerate(zip(bindings, counts, strict=True)):
            if index not in self._expected and has_entry(binding.param, count):
                self._expected.add(index)
                if self._mapping.peek(binding.param) is ABSENT:
                    self._mapping.put(binding.param, None)

    def entry_of(self, param: Any) -> Entry:
        """Return an entry for a parameter; an empty one if its own is gone or does not exist yet.

        Raises:
            KeyError: The parameter is not the optimizer's.
        """
        index = self._parts.registry.index_of(param)
        if index is None or self._mapping is None:
            raise KeyError("not a parameter of this optimizer")
        values = {} if self._mapping.peek(param) is ABSENT else self._values(index)
        missing = None
        if self._parts.topology.num_nodes > 1:
            missing = "each node has a part of it. Call gather_state_dict() for the whole, or "
            missing += "shardopt.checkpoint.save"
        return Entry(values, self, param, missing)

    def note_write(self, param: Any) -> None:
        """See ``state_mapping.Owner``."""
        index = self._parts.registry.index_of(param)
        if index is not None:
            self._dirty[index] = None
        elif not any(param is each for each in self._surplus):
            self._surplus.append(param)

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
        chosen = [b.param for b in registry.bindings] if params is None else list(params)
        if any(registry.index_of(param) is None for param in chosen):
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
        topology, params, places = self._parts.topology, state.partition.params, self.places()
        version, is_whole, entries = self._parts.rule.version, topology.num_nodes == 1, {}
        counts = self._changed_counts(self.find_edits())
        for index, (param, count) in enumerate(zip(state.params, counts, strict=True)):
            if index in self._resets or not has_entry(param, count):
                continue
            entry = state.new_entry(count)
            if not is_whole:
                entry["slices"] = [(run.start, run.stop) for run in places[index].runs]
            for key, array in self.arrays(index).items():
                shaped = array.reshape(params[index].spec.shape) if is_whole else array
                entry[key] = state.adapter.from_array(shaped, param if is_whole else None)
                self._handed_out.add(entry[key], version)
            entries[index] = entry
        part: StateDict = {}
        if not is_whole:
            node, _ = topology.places[topology.rank]
            part = {PART_KEY: {"node": node, "num_nodes": topology.num_nodes}}
        return {"state": entries, "param_groups": packed_groups(state.groups), **part}

    def arrays(self, index: int) -> dict[str, FloatArray]:
        """Return new views of the node's part of the state of a parameter, flat."""
        place = self.places()[index]
        own = self._parts.memory.state.own_arrays(place.region)
        return {key: array[place.local.slice] for key, array in own.items()}

    def places(self) -> list[NodePart]:
        """Return the node's part of the state of each parameter."""
        partition = self._parts.registry.partition
        if self._places[0] is not partition:
            topology = self._parts.topology
            node, _ = topology.places[topology.rank]
            self._places = partition, node_parts(partition, node)
        return self._places[1]

    def release(self) -> None:
        """Leave users with what they hold: dicts like any other, with the values that they have."""
        if self._mapping is not None:
            self._mapping.detach()
            self._mapping = None

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
        is_in_place = _is_same(array, self.arrays(part.param)[part.key])
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
        if self._mapping is None:
            return {}
        if self._dirty or self._surplus:
            self._take_over(self._mapping)
        edits = {Written(index, RESET_KEY): 0 for index in sorted(self._resets)}
        for chunk in self._counts:
            for edit in chunk.edited():
                if edit.param not in self._resets:
                    offset, name = edit.param - chunk.first, registry.bindings[edit.param].name
                    parse_step_count({key: chunk.values[key][offset] for key in COUNT_KEYS}, name)
                    edits[edit] = bits_of(chunk.values[edit.key][offset])
        return edits

    def adopt(self, edits: Mapping[Written, int]) -> None:
        """Make the edits that all ranks have agreed on, to what this rank owns."""
        if not edits:
            return
        parts = self._parts
        resets = {index for index, key in edits if key == RESET_KEY}
        counts = self._changed_counts(edits)
        for _, arrays in self._owned(resets):
            for array in arrays.values():
                array[:] = 0
        parts.rule.set_step_counts(counts)
        self._expected -= resets
        self._resets -= resets
        if self._mapping is not None:
            for index in resets:
                self._mapping.discard(parts.registry.bindings[index].param)
                self._chunk(index).forget(index)
            self.refresh()

    def forget(self) -> None:
        """Drop what this rank's user has done: other values are there now."""
        if self._mapping is None:
            return
        for index in [*self._dirty, *self._resets]:
            param = self._parts.registry.bindings[index].param
            self._mapping.discard(param)
            if index in self._expected:
                self._mapping.put(param, None)
        for param in self._surplus:
            self._mapping.discard(param)
        self._dirty.clear()
        self._resets.clear()
        self._surplus.clear()
        for chunk in self._counts:
            for edit in list(chunk.edited()):
                chunk.forget(edit.param)

    # -- inside ------------------------------------------------------------------------------------

    def _values(self, index: int) -> dict[str, Any]:
        """Return the values of an entry."""
        registry = self._parts.registry
        adapter, param = registry.adapter, registry.bindings[index].param
        chunk = self._chunk(index)
        values = {
            key: adapter.from_array(chunk.values[key][index - chunk.first, ...], None)
            for key in COUNT_KEYS
        }
        if self._parts.topology.num_nodes == 1:
            shape = registry.partition.params[index].spec.shape
            for key, array in self.arrays(index).items():
                values[key] = adapter.from_array(array.reshape(shape), param)
        return values

    def _chunk(self, index: int) -> ShownCounts:
        return self._counts[bisect_right(self._counts, index, key=lambda chunk: chunk.first) - 1]

    def _take_over(self, mapping: State) -> None:
        """Copy what users have put into entries to where the state is."""
        bindings = self._parts.registry.bindings
        left = [param for param in self._surplus if param in mapping]
        rule, got = "have entries for the parameters of this optimizer only", f"{left!r:.80}"
        require(not left, "opt.state", rule, got, _AS_STATE)
        resets, changed = set(), {}
        for index in self._dirty:
            entry = mapping.peek(bindings[index].param)
            if entry is ABSENT or (isinstance(entry, Mapping) and not entry):
                resets |= {index} & self._expected
            elif entry is not None:
                changed[index] = self._parse(index, entry)
        views = [piece.view for _, piece in self._parts.memory.pieces]
        copies = [  # before anything is written, as they may be views of one another
            (self.arrays(index)[key], new.copy() if _overlaps_any(new, views) else new)
            for index, (_, arrays) in changed.items()
            for key, new in arrays.items()
        ]
        for array, new in copies:
            array[:] = new
        for index, (numbers, _) in changed.items():
            chunk = self._chunk(index)
            for key, number in numbers.items():
                chunk.values[key][index - chunk.first] = number
            entry, param = mapping.peek(bindings[index].param), bindings[index].param
            if isinstance(entry, Entry) and entry.is_of(self, param):
                entry.restore(self._values(index))
            else:
                mapping.put(param, None)
        self._resets = (self._resets - set(changed)) | resets
        self._dirty.clear()
        self._surplus.clear()

    def _parse(
        self, index: int, entry: Any
    ) -> tuple[Mapping[str, float], Mapping[str, FloatArray]]:
        """Return the step count of a changed entry, and the arrays that are not the views."""
        registry = self._parts.registry
        spec, adapter = registry.partition.params[index].spec, registry.adapter
        specs = state_specs(spec.dtype) if self._parts.topology.num_nodes == 1 else ()
        name, keys = f"opt.state of {spec.name!r}", [*COUNT_KEYS, *(each.key for each in specs)]
        rule = f"be a dict with the keys {', '.join(keys)}"
        is_dict = isinstance(entry, Mapping)
        require(is_dict, name, rule, f"a {type(entry).__name__}", _AS_STATE)
        hyper = Hyperparams.from_group(registry.param_groups[spec.group])
        try:
            values = adapter.read_entry(entry, hyper)
            require(set(values) == set(keys), name, rule, sorted(values), _AS_STATE)
            numbers = {key: float(values[key]) for key in COUNT_KEYS}
            views = self.arrays(index)
            arrays = {
                each.key: parse_array(values[each.key], each, spec.name, spec.shape)
                for each in specs
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            got = f"{type(error).__name__} ({error}) where it was read"
            raise CheckpointError(f"{name} must {rule}; got {got}. {_AS_STATE}.") from error
        return numbers, {k: new for k, new in arrays.items() if not _is_same(new, views[k])}

    def _changed_counts(self, edits: Mapping[Written, int]) -> list[StepCount]:
        """Return all step counts as they are with some edits."""
        counts = list(self._parts.rule.step_counts)
        for (index, key), bits in edits.items():
            if key == RESET_KEY:
                counts[index] = StepCount()
            else:
                number = number_of(bits)
                step, mu_product = counts[index].step, counts[index].mu_product
                is_step = key == "step"
                counts[index] = StepCount(
                    int(number) if is_step else step, mu_product if is_step else number
                )
        return counts

    def _owned(self, indices: set[int]) -> Iterator[tuple[int, Mapping[str, FloatArray]]]:
        """Yield the state that this rank owns of some parameters."""
        parts = self._parts
        state = OptimizerState(
            parts.registry.partition, parts.memory, (), [], parts.registry.adapter
        )
        for index, _, arrays in state.owned():
            if index in indices:
                yield index, arrays


def _is_same(left: FloatArray, right: FloatArray) -> bool:
    """Whether two flat arrays are the same memory."""
    address = left.__array_interface__["data"], left.strides, left.shape
    return left.dtype == right.dtype and address == (
        right.__array_interface__["data"],
        right.strides,
        right.shape,
    )


def _overlaps_any(array: FloatArray, others: Sequence[Any]) -> bool:
    return any(np.may_share_memory(array, other) for other in others)
