"""State dicts: this rank's part of the state, the whole of it, and loading either.

An entry of ``state`` is whole when its arrays have the parameter's shape, and sharded when it has
``slices``: then its arrays are flat and hold those runs of the flattened parameter, end to end.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from shardopt._typing import FloatArray
from shardopt.comm.collectives import Collectives
from shardopt.errors import CheckpointError, HyperparamsError
from shardopt.layout.dtypes import is_floating
from shardopt.layout.partition import ParamSpec, Partition
from shardopt.layout.span import Span
from shardopt.layout.state_spec import StateSpec, state_specs
from shardopt.params.adapter import Adapter
from shardopt.params.groups import Group, group_values
from shardopt.rule.nadam import Hyperparams, StepCount
from shardopt.store.memory import Memory

StateDict = dict[str, Any]

_SCALARS = ("step", "mu_product")


@dataclass(frozen=True)
class OptimizerState:
    """The state of an optimizer, as this rank has it.

    Attributes:
        partition: Where every element lives.
        memory: The arrays.
        step_counts: One for each parameter.
        groups: The param groups.
    """

    partition: Partition
    memory: Memory
    step_counts: Sequence[StepCount]
    groups: list[Group]

    def owned(self) -> Iterator[tuple[int, Span, Mapping[str, FloatArray]]]:
        """Yield the parts of parameters that this rank owns.

        Yields:
            Index of the parameter; the part, a span of the flattened parameter; for each key of
            the state the part of its array.
        """
        for region, buffers in enumerate(self.memory.buffers):
            arrays = self.memory.state.arrays(region)
            for index, span, local in self.partition.owned_params(buffers.shards):
                yield index, span, {key: array[local.slice] for key, array in arrays.items()}

    def slices(self) -> list[list[tuple[int, int]]]:
        """Return for each parameter the [start, stop) that this rank owns."""
        slices: list[list[tuple[int, int]]] = [[] for _ in self.partition.params]
        for index, span, _ in self.owned():
            slices[index].append((span.start, span.stop))
        return slices


def local_state(state: OptimizerState) -> StateDict:
    """Copy the part that this rank owns; see ``Optimizer.state_dict``."""
    parts: list[list[Mapping[str, FloatArray]]] = [[] for _ in state.partition.params]
    for index, _, arrays in state.owned():
        parts[index].append(arrays)
    slices = state.slices()
    entries = {}
    for index, param in enumerate(state.partition.params):
        entry: StateDict = {**_count_entry(state.step_counts[index]), "slices": slices[index]}
        for spec in state_specs(param.spec.dtype):
            pieces = [arrays[spec.key] for arrays in parts[index]]
            entry[spec.key] = np.concatenate([np.zeros(0, spec.dtype), *pieces])
        entries[index] = entry
    return {"state": entries, "param_groups": _packed_groups(state.groups)}


def gather_state(
    state: OptimizerState, collectives: Collectives, root: int, step: int
) -> StateDict | None:
    """Gather the whole state on ``root``; see ``Optimizer.gather_state_dict``. Collective."""
    rank, call = collectives.topology.rank, "gather_state_dict()"
    params = state.partition.params
    wholes = [_zero_state(param.spec) for param in params] if rank == root else []
    for source, place in enumerate(collectives.topology.places):
        # Each rank's part has a deadline of its own.
        collectives.allreduce(np.zeros(1), MPI.MAX, step, call)
        for region in range(len(state.partition.regions)):
            for key, own in state.memory.state.arrays(region).items():
                if rank == source != root:
                    collectives.send(own, root, step, call)
                if rank != root:
                    continue
                shards, array = state.partition.shards(*place, region), own
                if source != root:
                    array = np.empty(sum(shard.numel for shard in shards), own.dtype)
                    collectives.receive(array, source, step, call)
                for index, span, local in state.partition.owned_params(shards):
                    wholes[index][key][span.slice] = array[local.slice]
    if rank != root:
        return None
    entries = {
        index: {
            **_count_entry(state.step_counts[index]),
            **{key: array.reshape(param.spec.shape) for key, array in wholes[index].items()},
        }
        for index, param in enumerate(params)
    }
    return {"state": entries, "param_groups": _packed_groups(state.groups)}


@dataclass(frozen=True)
class LoadedState:
    """A state dict that fits the optimizer.

    Attributes:
        groups: The values of each param group.
        step_counts: One for each parameter.
        arrays: For each parameter flat arrays by key: the whole of it, or this rank's part.
        sharded: Whether it is the latter.
    """

    groups: list[Group]
    step_counts: list[StepCount]
    arrays: list[dict[str, FloatArray]]
    sharded: bool


def parse_state(
    state_dict: Mapping[str, Any] | None, state: OptimizerState, adapter: Adapter[Any]
) -> LoadedState | None:
    """Check a state dict, if this rank has one, against the optimizer, which does not change.

    Args:
        state_dict: In the format of ``local_state``, ``gather_state`` or the framework.
        state: The optimizer's.
        adapter: Knows its framework's format.

    Raises:
        CheckpointError: It does not fit; the message says where.
    """
    if state_dict is None:
        return None
    try:
        return _parse_state(state_dict, state, adapter)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__} ({error}) where it was read"
        raise CheckpointError(
            f"state_dict must have the form of torch's; got {got}. {_OWN_FORMAT}."
        ) from error


def _parse_state(
    state_dict: Mapping[str, Any], state: OptimizerState, adapter: Adapter[Any]
) -> LoadedState:
    is_dict, got = isinstance(state_dict, Mapping), type(state_dict).__name__
    _require(is_dict, "state_dict", "have the form of torch's", got, _OWN_FORMAT)
    for key in ("state", "param_groups"):
        rule = f"have the key {key!r}"
        _require(key in state_dict, "state_dict", rule, sorted(state_dict), _OWN_FORMAT)
    new_groups = _parse_groups(state_dict["param_groups"], state.groups)
    hypers = [Hyperparams.from_group(group) for group in new_groups]
    entries, params = state_dict["state"], state.partition.params
    surplus = sorted(set(entries) - set(range(len(params))), key=str)
    rule = f"have entries 0 to {len(params) - 1} only"
    _require(not surplus, "state", rule, surplus, _OTHER_MODEL)
    sharded = any("slices" in entry for entry in entries.values())
    slices = state.slices() if sharded else [None] * len(params)
    loaded = LoadedState(new_groups, [], [], sharded)
    for index, param in enumerate(params):
        if index in entries:
            entry = adapter.read_entry(entries[index], hypers[param.spec.group])
            loaded.arrays.append(_parse_arrays(entry, param.spec, slices[index]))
            loaded.step_counts.append(_parse_step_count(entry, param.spec.name))
            continue
        rule, got = "have a sharded entry for every parameter", f"none for {param.spec.name!r}"
        _require(not sharded, "state", rule, got, _OWN_FORMAT)
        loaded.step_counts.append(StepCount())  # torch has no entry for one that never stepped
        loaded.arrays.append(_zero_state(param.spec))
    return loaded


def _parse_arrays(
    entry: Mapping[str, Any], spec: ParamSpec, slices: list[tuple[int, int]] | None
) -> dict[str, FloatArray]:
    """Check one parameter's arrays; ``slices`` are this rank's, of a sharded state."""
    specs = state_specs(spec.dtype)
    present = [array for array in specs if not array.is_optional or array.key in entry]
    keys = {*_SCALARS, *(array.key for array in present)}
    keys |= {"slices"} if slices is not None else set()
    rule = f"have the keys {', '.join(sorted(keys))}"
    got = set(entry) - {"master"} | (keys & {"master"})  # only 16-bit parameters use masters
    _require(got == keys, f"state of {spec.name!r}", rule, sorted(entry), _OTHER_MODEL)
    shape, arrays = spec.shape, _zero_state(spec)
    if slices is not None:
        saved = [tuple(run) for run in entry["slices"]]
        name = f"slices of {spec.name!r}"
        _require(saved == slices, name, f"be {slices}", saved, _OTHER_RANKS)
        shape = (sum(stop - start for start, stop in slices),)
    for each in present:
        arrays[each.key] = _parse_array(entry[each.key], each, spec.name, shape)
    return arrays


def _parse_array(value: Any, spec: StateSpec, name: str, shape: tuple[int, ...]) -> FloatArray:
    array, what = np.asarray(value), f"{spec.key} of {name!r}"
    _require(is_floating(array.dtype), what, "be floating point", array.dtype, _OTHER_MODEL)
    _require(array.shape == shape, what, f"have shape {shape}", array.shape, _OTHER_MODEL)
    flat: FloatArray = array.reshape(-1).astype(spec.dtype, copy=False)
    return flat


def load_state(loaded: LoadedState, state: OptimizerState) -> None:
    """Copy this rank's part of a loaded state into place."""
    num_taken = [0] * len(state.partition.params)
    for index, span, arrays in state.owned():
        start = num_taken[index] if loaded.sharded else span.start
        num_taken[index] = stop = start + span.numel
        for key, array in arrays.items():
            array[:] = loaded.arrays[index][key][start:stop]


def share_state(
    loaded: LoadedState | None, partition: Partition, collectives: Collectives, step: int
) -> LoadedState:
    """Copy the state of the lowest rank that has a whole one to ranks that have none.

    Collective: every rank.

    Raises:
        CheckpointError: Some rank has none, and no rank a whole one.
    """
    call = "load_state_dict()"
    kinds = collectives.allgather(None if loaded is None else loaded.sharded, step, call)
    if None not in kinds:
        assert loaded is not None
        return loaded
    _require(
        False in kinds, "state_dict", "be whole on some rank if others have none", kinds, _WHOLE
    )
    source = kinds.index(False)
    own = loaded if collectives.topology.rank == source else None
    outlines = collectives.allgather((own.groups, own.step_counts) if own else ([], []), step, call)
    wholes = [_zero_state(param.spec) for param in partition.params]
    for index, arrays in enumerate(wholes):
        for key, array in arrays.items():
            if own is not None:
                array[:] = own.arrays[index][key]
            collectives.bcast(array, source, step, call)
    return LoadedState(*outlines[source], wholes, sharded=False)


def _zero_state(spec: ParamSpec) -> dict[str, FloatArray]:
    """Return the arrays of a parameter that has never stepped, [numel] each."""
    return {each.key: np.zeros(spec.numel, each.dtype) for each in state_specs(spec.dtype)}


_WHOLE = "Pass what gather_state_dict() gave on root"
_OWN_FORMAT = "Pass what state_dict() or gather_state_dict() gave"
_OTHER_MODEL = "Load it into the optimizer of the model it was saved from"
_OTHER_RANKS = "Load it on as many ranks as saved it, or save with gather_state_dict()"


def _require(holds: bool, name: str, rule: str, got: object, remedy: str) -> None:
    if not holds:
        raise CheckpointError(f"{name} must {rule}; got {got}. {remedy}.")


def _parse_groups(saved: Sequence[Mapping[str, Any]], groups: Sequence[Group]) -> list[Group]:
    _require(
        len(saved) == len(groups), "param_groups", f"be {len(groups)}", len(saved), _OTHER_MODEL
    )
    parsed: list[Group] = []
    first = 0
    for index, (old, new) in enumerate(zip(groups, saved, strict=True)):
        name = f"params of param_groups[{index}]"
        indices = list(range(first, first + len(old["params"])))
        got = list(new["params"])
        _require(len(got) == len(indices), name, f"be {len(indices)}", len(got), _OTHER_MODEL)
        _require(got == indices, name, f"be numbered {indices}", got, _OTHER_MODEL)
        first += len(indices)
        values = group_values({**old, **copy.deepcopy(dict(new))})  # it may hold tensors
        try:
            Hyperparams.from_group(values)
        except HyperparamsError as error:
            raise CheckpointError(f"in param_groups[{index}] of the state dict, {error}") from None
        parsed.append(values)
    return parsed


def _parse_step_count(entry: Mapping[str, Any], name: str) -> StepCount:
    step, mu_product = float(entry["step"]), float(entry["mu_product"])
    whole = step >= 0 and step.is_integer()
    _require(whole, f"step of {name!r}", "be a whole number >= 0", step, _OTHER_MODEL)
    in_range = 0.0 <= mu_product <= 1.0
    _require(in_range, f"mu_product of {name!r}", "lie in [0, 1]", mu_product, _OTHER_MODEL)
    return StepCount(int(step), mu_product)


def _count_entry(count: StepCount) -> dict[str, float]:
    return {"step": float(count.step), "mu_product": count.mu_product}


def _packed_groups(groups: Sequence[Group]) -> list[Group]:
    """Return groups with indices in the place of parameters, counted through all groups."""
    packed, first = [], 0
    for group in groups:
        indices = list(range(first, first + len(group["params"])))
        packed.append({**group, "params": indices})
        first += len(indices)
    return packed
