"""The state that all ranks load together: who has which part of it, and how it gets into place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import xxhash
from mpi4py import MPI

from shardopt._typing import FloatArray
from shardopt.backends.codes import put_values, values_of
from shardopt.comm.collectives import Collectives
from shardopt.core.state_dict import OptimizerState
from shardopt.core.state_parsing import LoadedState, Piece, require
from shardopt.layout.partition import ParamSpec, Partition
from shardopt.layout.span import Span
from shardopt.layout.state_spec import FULL
from shardopt.params.group_values import saved_values
from shardopt.params.groups import Group
from shardopt.rule.coefficients import StepCount

_CALL = "load_state_dict()"


@dataclass(frozen=True)
class LoadPlan:
    """Where each rank gets a state from.

    Attributes:
        groups: The values of each param group.
        step_counts: One for each parameter.
        senders: What each rank that sends has of each parameter; empty if every rank has what it
            needs.
    """

    groups: list[Group]
    step_counts: list[StepCount]
    senders: Mapping[int, Sequence[tuple[Span, ...] | None]] = field(default_factory=dict)


class Losses(NamedTuple):
    """The bits of a state that have no place here.

    Attributes:
        was_rounded: Whether values had to be rounded to codes.
        left_masters_out: Whether it had masters of parameters that have none.
    """

    was_rounded: bool = False
    left_masters_out: bool = False


def plan_load(
    loaded: LoadedState | None, state: OptimizerState, collectives: Collectives, step: int
) -> LoadPlan:
    """Find out who has which part of the state that all ranks are about to load; nothing changes.

    Collective: every rank.

    Raises:
        CheckpointError: All ranks together do not have the whole of it.
    """
    rank = collectives.topology.rank
    outline = None
    if loaded is not None:
        runs = loaded.runs()
        missing = [index for index, each in enumerate(runs) if each is None]
        is_enough = loaded.is_whole or _covers_owned(loaded, state)
        outline = loaded.is_whole, loaded.node, _digest(runs), is_enough, _digest(missing)
    outlines = collectives.allgather(outline, step, _CALL)
    given = {number: each for number, each in enumerate(outlines) if each is not None}
    require(bool(given), "state_dict", "be there on some rank", "None on every rank", _WHOLE)
    wholes = [number for number, each in given.items() if each[0]]
    is_enough = all(each[3] for each in given.values()) and len({e[4] for e in given.values()}) == 1
    if (
        loaded is not None
        and len(given) == len(outlines)
        and (is_enough or len(wholes) == len(given))
    ):
        return LoadPlan(loaded.groups, loaded.step_counts)
    # The lowest rank that has a whole state; else the lowest with each part.
    senders = wholes[:1] or sorted({each[1:3]: n for n, each in reversed(given.items())}.values())
    mine = None
    if loaded is not None and rank in senders:
        groups = [saved_values(group)[0] for group in loaded.groups]
        mine = groups, loaded.step_counts, loaded.runs()
    everyone = collectives.allgather(mine, step, _CALL)
    sent = {number: each for number, each in enumerate(everyone) if each is not None}
    runs_of = {number: each[2] for number, each in sent.items()}
    if not wholes:
        _require_all(runs_of, [given[number][1] for number in senders], state.partition)
    if loaded is None:
        groups, step_counts, _ = sent[senders[0]]
        return LoadPlan(groups, step_counts, runs_of)
    return LoadPlan(loaded.groups, loaded.step_counts, runs_of)


def _covers_owned(loaded: LoadedState, state: OptimizerState) -> bool:
    """Whether a part has all that this rank owns, of the parameters that it has entries for."""
    for index, span, _ in state.owned():
        piece = loaded.pieces[index]
        if piece is not None and sum(span.intersect(run).numel for run in piece.runs) < span.numel:
            return False
    return True


def _require_all(
    runs_of: Mapping[int, Sequence[tuple[Span, ...] | None]],
    nodes: Sequence[tuple[int, int] | None],
    partition: Partition,
) -> None:
    """Refuse parts of which something is missing."""
    counts = {node[1] for node in nodes if node is not None}
    if len(counts) == 1 and None not in nodes:
        (num_nodes,) = counts
        found = {node[0] for node in nodes if node is not None}
        missing = [f"node {node} of {num_nodes}" for node in range(num_nodes) if node not in found]
        got = f"nothing of {', '.join(missing)}"
        require(not missing, "state_dict", _TOGETHER, got, _ALL_PARTS)
    for index, param in enumerate(partition.params):
        runs = sorted(run for each in runs_of.values() for run in each[index] or ())
        if all(each[index] is None for each in runs_of.values()):
            continue
        position = 0
        for run in [*runs, Span(param.numel, param.numel)]:
            got = f"nothing of elements {position} to {run.start} of {param.spec.name!r}"
            require(run.start <= position, "state_dict", _TOGETHER, got, _ALL_PARTS)
            position = max(position, run.stop)


def load_state(
    loaded: LoadedState | None,
    plan: LoadPlan,
    state: OptimizerState,
    collectives: Collectives,
    step: int,
) -> Losses:
    """Put this rank's part of a state in place, wherever it comes from.

    Collective: every rank, if the plan has senders or some state is kept in a smaller form.

    Returns:
        The losses of all ranks together.
    """
    rank = collectives.topology.rank
    owned: dict[int, list[tuple[Span, Mapping[str, FloatArray]]]] = {}
    for index, span, arrays in state.owned():
        owned.setdefault(index, []).append((span, arrays))
    was_rounded = False
    has_all = loaded is not None and (loaded.is_whole or not plan.senders)
    for index, param in enumerate(state.partition.params):
        pieces = []
        if has_all:
            assert loaded is not None
            pieces = [loaded.pieces[index]]
        for sender, runs_of in plan.senders.items():
            runs = runs_of[index]
            if runs is None:
                continue
            own = loaded.pieces[index] if loaded is not None and rank == sender else None
            piece = _exchange(own, param.spec, runs, sender, collectives, step)
            pieces += [] if has_all else [piece]
        for span, arrays in owned.get(index, ()):
            was_rounded |= _put(pieces, span, param.spec, arrays)
    if all(region.form == FULL for region in state.partition.regions):
        return Losses()
    losses = Losses(was_rounded, loaded is not None and loaded.has_surplus_masters)
    return Losses(*map(bool, collectives.allreduce(np.array(losses, float), MPI.MAX, step, _CALL)))


def _exchange(
    own: Piece | None,
    spec: ParamSpec,
    runs: tuple[Span, ...],
    sender: int,
    collectives: Collectives,
    step: int,
) -> Piece:
    """Send what one rank has of a parameter to all others. Collective."""
    numel, arrays = sum(run.numel for run in runs), {}
    for each in spec.state:
        array = np.empty(numel, each.value_dtype) if own is None else own.arrays[each.key]
        if numel:
            collectives.bcast(np.ascontiguousarray(array), sender, step, _CALL)
        arrays[each.key] = array
    return Piece(runs, arrays)


def _put(
    pieces: Sequence[Piece | None], span: Span, spec: ParamSpec, arrays: Mapping[str, FloatArray]
) -> bool:
    """Copy a span of a parameter out of pieces of its state; return if it had to be rounded."""
    found = [piece for piece in pieces if piece is not None]
    if not found:  # it has never stepped
        for array in arrays.values():
            if array.any():  # pages that nobody has written to take no memory
                array[:] = 0
    values = {each.key: values_of(arrays[each.key], each, span.numel) for each in spec.state}
    for piece in found:
        start = 0
        for run in piece.runs:
            part = span.intersect(run)
            source = part.shift(start - run.start)
            start += run.numel
            if not part:
                continue
            for key in arrays.keys() - piece.in_place:
                values[key][part.index_in(span)] = piece.arrays[key][source.slice]
    was_rounded = False
    for each in spec.state:
        if each.codec is not None and found:
            put_values(arrays[each.key], each, values[each.key])
            kept = values_of(arrays[each.key], each, span.numel)
            was_rounded |= not np.array_equal(kept, values[each.key], equal_nan=True)
    return was_rounded


def _digest(value: object) -> int:
    return xxhash.xxh3_64_intdigest(repr(value).encode())


_TOGETHER = "be whole on all ranks together"
_ALL_PARTS = (
    "Pass the parts of all nodes, each on some rank, or what gather_state_dict() gave; "
    "shardopt.checkpoint saves and loads on any number of nodes"
)
_WHOLE = "Pass what state_dict() or gather_state_dict() gave, on one rank at least"
