"""Writes of users into parameters and optimizer state since the last step.

[Note: weights that behave as in DDP]
A parameter that a framework holds is a *view*: a private mapping of the node's one copy. A page
that nobody writes to is the node's own and costs nothing; a page that a rank writes to becomes that
rank's copy, as if it had a replica of its own. At the next step each owner adopts what *its* view
holds, and afterwards all ranks see the node's values again. The arrays of the optimizer state that
users can reach are such views, too.

Something counts as written where the bytes of written pages differ from the node's copy. All ranks
must have written the same parameters: else they raise, and nothing is adopted. If they wrote other
values, as with seeds that differ, a warning names the parameter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from shardopt.comm.consensus import rank_list
from shardopt.comm.node_memory.comparing import changed
from shardopt.comm.node_memory.copying import copy_spans
from shardopt.comm.node_memory.private_view import PrivateView
from shardopt.errors import RankMismatchError
from shardopt.layout.node_arrays import NodeArray, NodeArrays
from shardopt.layout.partition import Partition
from shardopt.layout.span import Span
from shardopt.layout.state_spec import PARAM_KEY
from shardopt.store.memory import Memory

MASTER_KEY = "master"

_Spans = NDArray[np.int64]
"""[num_spans, 2]: where spans start and stop; sorted, and none overlaps another."""


class Written(NamedTuple):
    """A parameter, or an array of its state, that a user has written to."""

    param: int
    key: str


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """The parameters in one piece of memory; positions are in bytes.

    Attributes:
        of: What each part is.
        spans: Where each part is.
        owned: The parts of the piece that this rank owns.
    """

    of: Sequence[Written]
    spans: _Spans
    owned: _Spans


class UserWrites:
    """Finds what this rank's user has written, and brings it to the node's copy.

    Args:
        memory: The memory of the optimizer.
        place: The node and node rank of this rank.
    """

    def __init__(self, memory: Memory, place: tuple[int, int]) -> None:
        self._memory = memory
        self._place = place
        self._partition: Partition | None = None
        self._parts: list[_Parts | None] = []  # of each piece, in that partition
        self._found: list[tuple[_Spans, NDArray[np.int64]]] = []
        self._before: frozenset[Written] = frozenset()
        self._adopted: frozenset[Written] = frozenset()

    def find(self, partition: Partition) -> dict[Written, int]:
        """Find what differs from the node's copy.

        Nothing is forgotten before ``refresh``, so this may be called again.

        Returns:
            A hash of the value of each; 0 if it was written before the last step as well.
        """
        written: dict[Written, int] = {}
        self._found = []
        is_shown = self._memory.state.is_shown
        if self._partition is not partition:  # parameters may have other numbers
            self._partition, self._before = partition, frozenset()
            self._parts = [None] * len(self._memory.pieces)
        for number, (layout, view) in enumerate(self._memory.pieces):
            is_reachable = is_shown or layout.arrays[0].key == PARAM_KEY
            spans = view.find_writes() if is_reachable else ()
            if not spans:
                self._found.append(_NOTHING)
                continue
            parts = self._parts[number] or _lay_out(layout, partition, self._place)
            self._parts[number] = parts
            pieces, indices = overlaps(parts.spans, _as_spans(spans))
            differ = changed(view.view, view.shared, pieces)
            self._found.append((pieces[differ], indices[differ]))
            for index in np.unique(indices[differ]):
                start, stop = parts.spans[index]
                is_new = parts.of[index] not in self._before
                value = xxhash.xxh3_64_intdigest(view.view[start:stop].data) if is_new else 0
                written[parts.of[index]] = value
        return written

    def adopt(self, written: frozenset[Written], partition: Partition) -> int:
        """Copy what this rank owns of the changes that ``find`` found to the node's copy.

        Args:
            written: What all ranks have written; other changes of this rank are left out.
            partition: Where parameters are.

        Returns:
            Bytes copied.
        """
        self._adopted = written
        copied_nbytes = 0
        for param, key in written:
            if key == MASTER_KEY and Written(param, PARAM_KEY) not in written:
                self._round_master(param, partition)
        for layout, view, parts, pieces, indices in self._changes():
            wanted = np.array([each in written for each in parts.of], bool)
            spans, _ = overlaps(parts.owned, pieces[wanted[indices]])
            copy_spans(view.shared, view.view, spans)
            self._send_out(layout, spans)
            copied_nbytes += int((spans[:, 1] - spans[:, 0]).sum())
        return copied_nbytes

    def adopt_all(self, *, params: bool, state: bool) -> None:
        """Copy all changes that ``find`` found to the node's copy, whoever owns them."""
        for _, view, parts, pieces, _ in self._changes():
            is_params = parts.of[0].key == PARAM_KEY
            if params if is_params else state:
                copy_spans(view.shared, view.view, pieces)

    def discard(self, *, params: bool, state: bool) -> None:
        """Show the node's values of parameters, or of state, whatever this rank has written."""
        for layout, view in self._memory.pieces:
            is_params = layout.arrays[0].key == PARAM_KEY
            if params if is_params else state:
                view.find_writes()
                view.refresh()
        self._before = frozenset()  # a write to what is there now is the first of its kind

    def refresh(self) -> None:
        """Show the node's values again; what this rank has written and not adopted is gone."""
        for _, view in self._memory.pieces:
            view.refresh()
        self._before, self._adopted = self._adopted, frozenset()

    @property
    def private_nbytes(self) -> int:
        """Bytes of copies that this rank keeps, as it writes to them step after step."""
        return sum(view.kept_nbytes for _, view in self._memory.pieces)

    def _send_out(self, layout: NodeArrays, spans: _Spans) -> None:
        """Copy spans of a piece, in bytes, from home to where steps are, as far as they are state.

        Just these: of what nobody has written home may have older values.
        """
        if self._memory.residence.is_home or not spans.size:
            return
        for array in layout.arrays:
            if array.key != PARAM_KEY:
                bounds = np.array([[array.start, array.start + array.nbytes]], np.int64)
                found = (overlaps(bounds, spans)[0] - array.start).tolist()
                elements = [Span(i // array.itemsize, -(-j // array.itemsize)) for i, j in found]
                self._memory.residence.send_state_out(array.key, array.region, elements)

    def _changes(
        self,
    ) -> Iterator[tuple[NodeArrays, PrivateView, _Parts, _Spans, NDArray[np.int64]]]:
        """Yield each piece with changes, which ones, and the indices of the parts they are in."""
        for (layout, view), parts, (pieces, indices) in zip(
            self._memory.pieces, self._parts, self._found, strict=True
        ):
            if parts is not None and len(indices):
                yield layout, view, parts, pieces, indices

    def _round_master(self, param: int, partition: Partition) -> None:
        """Write the rounded values of a written master into its parameter.

        Else the next update would take the parameter: see [Note: 16-bit parameters and masters].
        """
        region, residence = partition.params[param].region, self._memory.residence
        buffers, state = self._memory.buffers[region], self._memory.state
        masters, own = state.arrays(region)[MASTER_KEY], state.own_arrays(region)[MASTER_KEY]
        start, spans = partition.params[param].start, [list[Span]() for _ in self._memory.buffers]
        parts = [
            (local, buffers.local(span.shift(start)))
            for index, span, local in partition.owned_params(buffers.shards)
            if index == param
        ]
        spans[region] = [span for _, span in parts]
        # Some of it may stay. Where updates happen at home, it is there already.
        residence.bring_params_home(spans, is_updated=True)
        for local, span in parts:
            new, bits = own[local.slice], np.int64 if own.itemsize == 8 else np.int32
            differ = new.view(bits) != masters[local.slice].view(bits)
            node_param: NDArray[Any] = buffers.params[span.slice]
            node_param[differ] = new[differ].astype(node_param.dtype)
        residence.send_params_out(spans)
        residence.holder.wait()  # this step's update may write where it reads


def agree_on_writes(
    everyone: Sequence[Mapping[Written, int]],
    nodes: Sequence[int],
    names: Sequence[str],
) -> tuple[frozenset[Written], list[Written]]:
    """Compare what ranks have written; the same on every rank.

    Args:
        everyone: For each rank what ``UserWrites.find`` found; one entry if all are equal.
        nodes: The node of each rank: each has a part of the state, which is compared within it.
        names: Of the parameters.

    Returns:
        What somebody has written, and that part of it in which the values of ranks differ.

    Raises:
        RankMismatchError: Ranks have written different ones.
    """
    first = everyone[0]
    if all(each == first for each in everyone):
        return frozenset(first), []
    written = sorted(frozenset[Written]().union(*everyone))
    diverged = []
    for each in written:
        ranks = [rank for rank, found in enumerate(everyone) if each in found]
        # The nodes have different parts of the state, and one may have none of it.
        peers: Sequence[int] = range(len(everyone))
        if each.key != PARAM_KEY:
            with_part = {nodes[rank] for rank in ranks}
            peers = [rank for rank in peers if nodes[rank] in with_part]
        if missing := [rank for rank in peers if rank not in ranks]:
            raise _mismatch(describe(each, names), ranks, missing)
        values = {(each.key != PARAM_KEY and nodes[rank], everyone[rank][each]) for rank in ranks}
        if len(values) > len({of_node for of_node, _ in values}):
            diverged.append(each)
    return frozenset(written), diverged


def _mismatch(what: str, ranks: Sequence[int], missing: Sequence[int]) -> RankMismatchError:
    return RankMismatchError(
        f"all ranks must write to the same parameters between steps; got a write to {what} on "
        f"{rank_list(ranks)} and none on {rank_list(missing)}. Nothing has changed: write the "
        "value on all ranks, or call opt.adopt(rank=...) on all of them for the values of one. "
        "(Embedding(max_norm=...) writes to the rows of its own batch: normalise all rows instead.)"
    )


def describe(written: Written, names: Sequence[str]) -> str:
    """Return what somebody has written to, as text."""
    what = "parameter" if written.key == PARAM_KEY else f"{written.key} of parameter"
    return f"{what} {names[written.param]!r}"


_NOTHING: tuple[_Spans, NDArray[np.int64]] = (
    np.empty((0, 2), np.int64),
    np.empty(0, np.int64),
)


def overlaps(parts: _Spans, spans: _Spans) -> tuple[_Spans, NDArray[np.int64]]:
    """Intersect two lists of spans.

    Returns:
        The intersections that are not empty, in order, and for each the index of its part.
    """
    first = np.searchsorted(spans[:, 1], parts[:, 0], side="right")
    last = np.searchsorted(spans[:, 0], parts[:, 1], side="left")
    counts = np.maximum(last - first, 0)
    indices = np.repeat(np.arange(len(parts)), counts)
    within = np.arange(len(indices)) - np.repeat(np.cumsum(counts) - counts, counts)
    other = spans[first[indices] + within]
    both = np.empty((len(indices), 2), np.int64)
    both[:, 0] = np.maximum(parts[indices, 0], other[:, 0])
    both[:, 1] = np.minimum(parts[indices, 1], other[:, 1])
    return both, indices


def _as_spans(spans: Sequence[Span]) -> _Spans:
    return np.array([(span.start, span.stop) for span in spans], np.int64).reshape(-1, 2)


def _lay_out(layout: NodeArrays, partition: Partition, place: tuple[int, int]) -> _Parts:
    """Find the parameters in a piece of memory."""
    of: list[Written] = []
    spans: list[Span] = []
    owned: list[Span] = []
    for array in layout.arrays:
        for index, span in _spans_in(array, partition, place[0]):
            of.append(Written(index, array.key))
            spans.append(array.bytes_of(span))
        start = partition.regions[array.region].start
        for shard in partition.shards(*place, array.region):
            local = shard.shift(-start) if array.key == PARAM_KEY else shard.local
            owned.append(array.bytes_of(local))
    return _Parts(of, _as_spans(spans), _as_spans([span for span in owned if span]))


def _spans_in(array: NodeArray, partition: Partition, node: int) -> list[tuple[int, Span]]:
    """Return the parameters in an array of a region, and where they are."""
    region = partition.regions[array.region]
    if array.key == PARAM_KEY:
        placed = [(index, partition.params[index]) for index in region.param_indices]
        return [(index, span.shift(-region.start)) for index, span in placed if span]
    found: dict[int, Span] = {}
    for index, _, local in partition.owned_params(partition.node_shards(node, array.region)):
        first = found.get(index, local)  # [Note: the state of a node]: in one piece
        found[index] = Span(first.start, local.stop)
    return list(found.items())
