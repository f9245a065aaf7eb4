"""State dicts: this rank's part of the state, the whole of it, and the way back in.

An entry of ``state`` is whole when its moments have the parameter's shape, and sharded when it has
``slices``: then its moments are flat and hold those runs of the flattened parameter, end to end.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardopt.comm.topology import Topology
from shardopt.errors import CheckpointError, HyperparamsError
from shardopt.groups import Group, group_values
from shardopt.kernels.base import FloatArray
from shardopt.nadam import Clock, Hyperparams
from shardopt.partition import ParamSpec, Partition, Shard
from shardopt.storage import SectionStorage

StateDict = dict[str, Any]

MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALARS = ("step", "mu_product")
_MESSAGE_NUMEL = 1 << 27  # below every MPI's limit on one count


@dataclass(frozen=True)
class Run:
    """A rank's part of one parameter: where it is in the parameter, and in the rank's arrays."""

    param: int
    start: int
    stop: int
    local: slice


def owned_runs(partition: Partition, shards: Sequence[Shard]) -> Iterator[Run]:
    """Give the parts of parameters in some shards, in flat order."""
    for shard in shards:
        for index, start, stop in partition.params_in(shard.section, shard.start, shard.stop):
            zero, shift = partition.params[index].start, shard.local_start - shard.start
            yield Run(index, start - zero, stop - zero, slice(start + shift, stop + shift))


def local_state(
    partition: Partition,
    storages: Sequence[SectionStorage],
    clocks: Sequence[Clock],
    groups: list[Group],
) -> StateDict:
    """Copy what this rank owns; see ``ShardedNAdam.state_dict``."""
    runs: list[list[Run]] = [[] for _ in partition.params]
    for storage in storages:
        for run in owned_runs(partition, storage.shards):
            runs[run.param].append(run)
    entries = {}
    for index, param in enumerate(partition.params):
        entries[index] = {
            **_clock_entry(clocks[index]),
            "slices": [(run.start, run.stop) for run in runs[index]],
        }
        for name in MOMENTS:
            moment = getattr(storages[param.section], name)
            pieces = [moment[run.local] for run in runs[index]]
            entries[index][name] = np.concatenate([moment[:0], *pieces])
    return {"state": entries, "param_groups": _packed_groups(groups)}


def gather_state(
    partition: Partition,
    storages: Sequence[SectionStorage],
    clocks: Sequence[Clock],
    groups: list[Group],
    topology: Topology,
    root: int,
) -> StateDict | None:
    """Bring the whole state to ``root``; see ``ShardedNAdam.gather_state_dict``. Collective."""
    if topology.rank != root:
        for storage in storages:
            for name in MOMENTS:
                for piece in _messages(getattr(storage, name)):
                    topology.comm.Send(piece, root)
        return None
    moments = {
        name: [np.empty(p.spec.numel, p.spec.dtype) for p in partition.params] for name in MOMENTS
    }
    for rank, place in enumerate(topology.places):
        for section, storage in enumerate(storages):
            shards = partition.shards(*place, section)
            received = np.empty(sum(shard.numel for shard in shards), storage.section.dtype)
            for name in MOMENTS:
                owned = getattr(storage, name) if rank == root else received
                for piece in _messages(received) if rank != root else ():
                    topology.comm.Recv(piece, rank)
                for run in owned_runs(partition, shards):
                    moments[name][run.param][run.start : run.stop] = owned[run.local]
    entries = {
        index: {
            **_clock_entry(clocks[index]),
            **{name: moments[name][index].reshape(param.spec.shape) for name in MOMENTS},
        }
        for index, param in enumerate(partition.params)
    }
    return {"state": entries, "param_groups": _packed_groups(groups)}


@dataclass(frozen=True)
class ParsedState:
    """A state dict found to fit the optimizer.

    Attributes:
        groups: The values of each param group.
        clocks: One for each parameter.
        moments: By name, for each parameter a flat array: the whole of it, or what this rank owns.
        sharded: Whether it is the latter.
    """

    groups: list[Group]
    clocks: list[Clock]
    moments: dict[str, list[FloatArray]]
    sharded: bool


def parse_state(
    state_dict: Mapping[str, Any] | None,
    partition: Partition,
    storages: Sequence[SectionStorage],
    groups: Sequence[Group],
) -> ParsedState | None:
    """Check a state dict, if this rank has one, against the optimizer, which is left as it is.

    Raises:
        CheckpointError: It does not fit; the message says where.
    """
    if state_dict is None:
        return None
    try:
        return _parse_state(state_dict, partition, storages, groups)
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
    storages: Sequence[SectionStorage],
    groups: Sequence[Group],
) -> ParsedState:
    for key in ("state", "param_groups"):
        rule = f"have the key {key!r}"
        _require(key in state_dict, "state_dict", rule, sorted(state_dict), _OWN_FORMAT)
    new_groups = _parse_groups(state_dict["param_groups"], groups)
    entries = state_dict["state"]
    if not entries:  # of an optimizer that has never stepped
        zeros = [np.zeros(param.spec.numel, param.spec.dtype) for param in partition.params]
        fresh = [Clock() for _ in partition.params]
        return ParsedState(new_groups, fresh, dict.fromkeys(MOMENTS, zeros), sharded=False)
    _require_complete(entries, partition)
    sharded = any("slices" in entry for entry in entries.values())
    slices = _owned_slices(partition, storages) if sharded else [None] * len(partition.params)
    parsed = ParsedState(new_groups, [], {name: [] for name in MOMENTS}, sharded)
    for index, param in enumerate(partition.params):
        _parse_entry(entries[index], param.spec, slices[index], parsed)
    return parsed


def _require_complete(entries: Mapping[int, Any], partition: Partition) -> None:
    expected = set(range(len(partition.params)))
    missing = [partition.params[index].spec.name for index in sorted(expected - set(entries))]
    surplus = sorted(set(entries) - expected, key=str)
    rule = "have an entry for every parameter"
    _require(not missing, "state", rule, f"none for {', '.join(missing)}", _NEVER_STEPPED)
    rule = f"have entries 0 to {len(expected) - 1} only"
    _require(not surplus, "state", rule, surplus, _OTHER_MODEL)


def _parse_entry(
    entry: Mapping[str, Any],
    spec: ParamSpec,
    slices: list[tuple[int, int]] | None,
    parsed: ParsedState,
) -> None:
    """Check one parameter's entry and append it; ``slices`` are this rank's, of a sharded state."""
    keys = {*_SCALARS, *MOMENTS} | ({"slices"} if slices is not None else set())
    rule = f"have the keys {', '.join(sorted(keys))}"
    _require(set(entry) == keys, f"state of {spec.name!r}", rule, sorted(entry), _OTHER_MODEL)
    parsed.clocks.append(_parse_clock(entry, spec.name))
    shape = spec.shape
    if slices is not None:
        saved = [tuple(run) for run in entry["slices"]]
        name = f"slices of {spec.name!r}"
        _require(saved == slices, name, f"be {slices}", saved, _OTHER_RANKS)
        shape = (sum(stop - start for start, stop in slices),)
    for moment in MOMENTS:
        array = np.asarray(entry[moment])
        name = f"{moment} of {spec.name!r}"
        _require(array.dtype.kind == "f", name, "be floating point", array.dtype, _OTHER_MODEL)
        _require(array.shape == shape, name, f"have shape {shape}", array.shape, _OTHER_MODEL)
        parsed.moments[moment].append(array.reshape(-1))


def load_parsed(
    parsed: ParsedState, partition: Partition, storages: Sequence[SectionStorage]
) -> None:
    """Copy this rank's part of the moments into place."""
    for name in MOMENTS:
        taken = [0] * len(partition.params)
        for storage in storages:
            for run in owned_runs(partition, storage.shards):
                start = taken[run.param] if parsed.sharded else run.start
                stop = start + run.stop - run.start
                getattr(storage, name)[run.local] = parsed.moments[name][run.param][start:stop]
                taken[run.param] = stop


def share_parsed(parsed: ParsedState | None, topology: Topology) -> ParsedState:
    """Give ranks that have no state that of the lowest rank that has a whole one. Collective.

    Raises:
        CheckpointError: Some rank has none, and no rank a whole one.
    """
    kinds = topology.comm.allgather(None if parsed is None else parsed.sharded)
    if None not in kinds:
        assert parsed is not None
        return parsed
    _require(
        False in kinds, "state_dict", "be whole on some rank if others have none", kinds, _WHOLE
    )
    return _bcast_parsed(parsed, kinds.index(False), topology)


def _bcast_parsed(parsed: ParsedState | None, source: int, topology: Topology) -> ParsedState:
    comm, here = topology.comm, topology.rank == source
    outline = None
    if here and parsed is not None:
        sizes = {
            name: [(a.size, a.dtype) for a in arrays] for name, arrays in parsed.moments.items()
        }
        outline = parsed.groups, parsed.clocks, sizes
    groups, clocks, sizes = comm.bcast(outline, source)
    moments: dict[str, list[FloatArray]] = {name: [] for name in sizes}
    for name, arrays in sizes.items():
        for index, (size, dtype) in enumerate(arrays):
            array = np.empty(size, dtype)
            if here and parsed is not None:
                array[:] = parsed.moments[name][index]
            for piece in _messages(array):
                comm.Bcast(piece, source)
            moments[name].append(array)
    return ParsedState(groups, clocks, moments, sharded=False)


_WHOLE = "Pass what gather_state_dict() gave on root"
_OWN_FORMAT = "Pass what state_dict() or gather_state_dict() gave"
_OTHER_MODEL = "Load it into the optimizer of the model it was saved from"
_OTHER_RANKS = "Load it on as many ranks as saved it, or save with gather_state_dict()"
_NEVER_STEPPED = (
    "Load it into the optimizer of the model it was saved from; a parameter that never had a "
    "gradient needs step 0, mu_product 1 and moments of zeros"
)


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
        values = group_values({**old, **new})
        try:
            Hyperparams.from_group(values)
        except HyperparamsError as error:
            raise CheckpointError(f"in param_groups[{index}] of the state dict, {error}") from None
        parsed.append(values)
    return parsed


def _parse_clock(entry: Mapping[str, Any], name: str) -> Clock:
    step, mu_product = float(entry["step"]), float(entry["mu_product"])
    whole = step >= 0 and step.is_integer()
    _require(whole, f"step of {name!r}", "be a whole number >= 0", step, _OTHER_MODEL)
    in_range = 0.0 <= mu_product <= 1.0
    _require(in_range, f"mu_product of {name!r}", "lie in [0, 1]", mu_product, _OTHER_MODEL)
    return Clock(int(step), mu_product)


def _owned_slices(
    partition: Partition, storages: Sequence[SectionStorage]
) -> list[list[tuple[int, int]]]:
    slices: list[list[tuple[int, int]]] = [[] for _ in partition.params]
    for storage in storages:
        for run in owned_runs(partition, storage.shards):
            slices[run.param].append((run.start, run.stop))
    return slices


def _clock_entry(clock: Clock) -> dict[str, float]:
    return {"step": float(clock.step), "mu_product": clock.mu_product}


def _packed_groups(groups: Sequence[Group]) -> list[Group]:
    """Groups with indices in the place of parameters, counted through all groups."""
    packed, first = [], 0
    for group in groups:
        indices = list(range(first, first + len(group["params"])))
        packed.append({**group_values(group), "params": indices})
        first += len(indices)
    return packed


def _messages(array: FloatArray) -> Iterator[FloatArray]:
    for start in range(0, array.size, _MESSAGE_NUMEL):
        yield array[start : start + _MESSAGE_NUMEL]
