"""State dicts: this rank's part of the state, the whole of it, and the way back in.

An entry of ``state`` is whole when its moments have the parameter's shape, and sharded when it has
``slices``: then its moments are flat and hold those runs of the flattened parameter, end to end.
What stands here of moments holds for masters too.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from shardopt._typing import FloatArray
from shardopt.comm.collectives import Collectives
from shardopt.errors import CheckpointError, HyperparamsError
from shardopt.layout.dtypes import compute_dtype, is_floating, state_keys
from shardopt.layout.partition import ParamSpec, Partition, Run, owned_runs
from shardopt.params.adapter import Adapter
from shardopt.params.groups import Group, group_values
from shardopt.rule.nadam import Hyperparams, StepCount
from shardopt.store.buffers import ShardBuffers

StateDict = dict[str, Any]

_SCALARS = ("step", "mu_product")


@dataclass(frozen=True)
class OptimizerState:
    """What the state of an optimizer is made of, as this rank has it."""

    partition: Partition
    buffers: Sequence[ShardBuffers]
    step_counts: Sequence[StepCount]
    groups: list[Group]


def local_state(held: OptimizerState) -> StateDict:
    """Copy what this rank owns; see ``Optimizer.state_dict``."""
    runs: list[list[Run]] = [[] for _ in held.partition.params]
    for storage in held.buffers:
        for run in owned_runs(held.partition, storage.shards):
            runs[run.param].append(run)
    entries = {}
    for index, param in enumerate(held.partition.params):
        entries[index] = {
            **_clock_entry(held.step_counts[index]),
            "slices": [(run.start, run.stop) for run in runs[index]],
        }
        for key, moment in held.buffers[param.region].state.items():
            pieces = [moment[run.local] for run in runs[index]]
            entries[index][key] = np.concatenate([moment[:0], *pieces])
    return {"state": entries, "param_groups": _packed_groups(held.groups)}


def gather_state(
    held: OptimizerState, collectives: Collectives, root: int, step: int
) -> StateDict | None:
    """Bring the whole state to ``root``; see ``Optimizer.gather_state_dict``. Collective."""
    rank, call = collectives.topology.rank, "gather_state_dict()"
    moments = [_zero_moments(param.spec) for param in held.partition.params] if rank == root else []
    for source, place in enumerate(collectives.topology.places):
        collectives.allreduce(
            np.zeros(1), MPI.MAX, step, call
        )  # the deadline is for one rank's part
        if rank == root:
            receive = partial(collectives.receive, rank=source, step=step, phase=call)
            _place_moments(held, place, moments, None if source == root else receive)
        elif rank == source:
            for storage in held.buffers:
                for moment in storage.state.values():
                    collectives.send(moment, root, step, call)
    if rank != root:
        return None
    entries = {
        index: {
            **_clock_entry(held.step_counts[index]),
            **{key: moment.reshape(param.spec.shape) for key, moment in moments[index].items()},
        }
        for index, param in enumerate(held.partition.params)
    }
    return {"state": entries, "param_groups": _packed_groups(held.groups)}


def _place_moments(
    held: OptimizerState,
    place: tuple[int, int],
    moments: Sequence[Mapping[str, FloatArray]],
    receive: Callable[[FloatArray], None] | None,
) -> None:
    """Put what the rank at ``place`` owns where it belongs; without ``receive`` it is this one."""
    for region, storage in enumerate(held.buffers):
        shards = held.partition.shards(*place, region)
        for key, own in storage.state.items():
            moment = own
            if receive is not None:
                moment = np.empty(sum(shard.numel for shard in shards), own.dtype)
                receive(moment)
            for run in owned_runs(held.partition, shards):
                moments[run.param][key][run.start : run.stop] = moment[run.local]


@dataclass(frozen=True)
class LoadedState:
    """A state dict found to fit the optimizer.

    Attributes:
        groups: The values of each param group.
        step_counts: One for each parameter.
        moments: For each parameter flat arrays by name: the whole of it, or what this rank owns.
        sharded: Whether it is the latter.
    """

    groups: list[Group]
    step_counts: list[StepCount]
    moments: list[dict[str, FloatArray]]
    sharded: bool


def parse_state(
    state_dict: Mapping[str, Any] | None,
    partition: Partition,
    buffers: Sequence[ShardBuffers],
    groups: Sequence[Group],
    face: Adapter[Any],
) -> LoadedState | None:
    """Check a state dict, if this rank has one, against the optimizer, which is left as it is.

    Args:
        state_dict: In the format of ``local_state``, ``gather_state`` or the face's framework.
        partition: The optimizer's layout.
        buffers: Its memory.
        groups: Its param groups.
        face: Knows its framework's format.

    Raises:
        CheckpointError: It does not fit; the message says where.
    """
    if state_dict is None:
        return None
    try:
        return _parse_state(state_dict, partition, buffers, groups, face)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__} ({error}) where it was read"
        raise CheckpointError(
            f"state_dict must have the form of torch's; got {got}. {_OWN_FORMAT}."
        ) from error


def _parse_state(
    state_dict: Mapping[str, Any],
    partition: Partition,
    buffers: Sequence[ShardBuffers],
    groups: Sequence[Group],
    face: Adapter[Any],
) -> LoadedState:
    is_dict, got = isinstance(state_dict, Mapping), type(state_dict).__name__
    _require(is_dict, "state_dict", "have the form of torch's", got, _OWN_FORMAT)
    for key in ("state", "param_groups"):
        rule = f"have the key {key!r}"
        _require(key in state_dict, "state_dict", rule, sorted(state_dict), _OWN_FORMAT)
    new_groups = _parse_groups(state_dict["param_groups"], groups)
    hypers = [Hyperparams.from_group(group) for group in new_groups]
    entries = state_dict["state"]
    expected = range(len(partition.params))
    surplus = sorted(set(entries) - set(expected), key=str)
    rule = f"have entries 0 to {len(expected) - 1} only"
    _require(not surplus, "state", rule, surplus, _OTHER_MODEL)
    sharded = any("slices" in entry for entry in entries.values())
    slices = _owned_slices(partition, buffers) if sharded else [None] * len(expected)
    parsed = LoadedState(new_groups, [], [], sharded)
    for index, param in enumerate(partition.params):
        if index in entries:
            entry = face.read_entry(entries[index], hypers[param.spec.group])
            _parse_entry(entry, param.spec, slices[index], parsed)
            continue
        rule, got = "have a sharded entry for every parameter", f"none for {param.spec.name!r}"
        _require(not sharded, "state", rule, got, _OWN_FORMAT)
        parsed.step_counts.append(
            StepCount()
        )  # torch has no entry for a parameter that never stepped
        parsed.moments.append(_zero_moments(param.spec))
    return parsed


def _parse_entry(
    entry: Mapping[str, Any],
    spec: ParamSpec,
    slices: list[tuple[int, int]] | None,
    parsed: LoadedState,
) -> None:
    """Check one parameter's entry and append it; ``slices`` are this rank's, of a sharded state."""
    moment_keys = [key for key in state_keys(spec.dtype) if key != "master" or key in entry]
    keys = {*_SCALARS, *moment_keys} | ({"slices"} if slices is not None else set())
    rule = f"have the keys {', '.join(sorted(keys))}"
    got = set(entry) - {"master"} | (keys & {"master"})  # of 16 bits, and useful to them alone
    _require(got == keys, f"state of {spec.name!r}", rule, sorted(entry), _OTHER_MODEL)
    parsed.step_counts.append(_parse_clock(entry, spec.name))
    parsed.moments.append(_zero_moments(spec))  # a master of zero follows the parameter
    shape = spec.shape
    if slices is not None:
        saved = [tuple(run) for run in entry["slices"]]
        name = f"slices of {spec.name!r}"
        _require(saved == slices, name, f"be {slices}", saved, _OTHER_RANKS)
        shape = (sum(stop - start for start, stop in slices),)
    for key in moment_keys:
        array = np.asarray(entry[key])
        name = f"{key} of {spec.name!r}"
        _require(is_floating(array.dtype), name, "be floating point", array.dtype, _OTHER_MODEL)
        _require(array.shape == shape, name, f"have shape {shape}", array.shape, _OTHER_MODEL)
        dtype = compute_dtype(spec.dtype)
        parsed.moments[-1][key] = array.reshape(-1).astype(dtype, copy=False)


def load_parsed(parsed: LoadedState, partition: Partition, buffers: Sequence[ShardBuffers]) -> None:
    """Copy this rank's part of the moments into place."""
    taken = [0] * len(partition.params)
    for storage in buffers:
        for run in owned_runs(partition, storage.shards):
            start = taken[run.param] if parsed.sharded else run.start
            taken[run.param] = stop = start + run.stop - run.start
            for key, moment in storage.state.items():
                moment[run.local] = parsed.moments[run.param][key][start:stop]


def share_parsed(
    parsed: LoadedState | None, partition: Partition, collectives: Collectives, step: int
) -> LoadedState:
    """Give ranks that have no state that of the lowest rank that has a whole one. Collective.

    Raises:
        CheckpointError: Some rank has none, and no rank a whole one.
    """
    call = "load_state_dict()"
    kinds = collectives.gather(None if parsed is None else parsed.sharded, step, call)
    if None not in kinds:
        assert parsed is not None
        return parsed
    _require(
        False in kinds, "state_dict", "be whole on some rank if others have none", kinds, _WHOLE
    )
    source = kinds.index(False)
    own = parsed if collectives.topology.rank == source else None
    outlines = collectives.gather((own.groups, own.step_counts) if own else ([], []), step, call)
    moments = [_zero_moments(param.spec) for param in partition.params]
    for index, arrays in enumerate(moments):
        for key, array in arrays.items():
            if own is not None:
                array[:] = own.moments[index][key]
            collectives.broadcast(array, source, step, call)
    return LoadedState(*outlines[source], moments, sharded=False)


def _zero_moments(spec: ParamSpec) -> dict[str, FloatArray]:
    """The moments of a parameter that has never stepped, [numel] each."""
    return {key: np.zeros(spec.numel, compute_dtype(spec.dtype)) for key in state_keys(spec.dtype)}


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


def _parse_clock(entry: Mapping[str, Any], name: str) -> StepCount:
    step, mu_product = float(entry["step"]), float(entry["mu_product"])
    whole = step >= 0 and step.is_integer()
    _require(whole, f"step of {name!r}", "be a whole number >= 0", step, _OTHER_MODEL)
    in_range = 0.0 <= mu_product <= 1.0
    _require(in_range, f"mu_product of {name!r}", "lie in [0, 1]", mu_product, _OTHER_MODEL)
    return StepCount(int(step), mu_product)


def _owned_slices(
    partition: Partition, buffers: Sequence[ShardBuffers]
) -> list[list[tuple[int, int]]]:
    slices: list[list[tuple[int, int]]] = [[] for _ in partition.params]
    for storage in buffers:
        for run in owned_runs(partition, storage.shards):
            slices[run.param].append((run.start, run.stop))
    return slices


def _clock_entry(clock: StepCount) -> dict[str, float]:
    return {"step": float(clock.step), "mu_product": clock.mu_product}


def _packed_groups(groups: Sequence[Group]) -> list[Group]:
    """Groups with indices in the place of parameters, counted through all groups."""
    packed, first = [], 0
    for group in groups:
        indices = list(range(first, first + len(group["params"])))
        packed.append({**group, "params": indices})
        first += len(indices)
    return packed
