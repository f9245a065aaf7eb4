"""What this rank's user has done to the optimizer state, and what all users have.

[Note: what users do to the state]
Arrays of the state are views that this rank may write to: see [Note: weights that behave as in
DDP]. Another array put in the place of one is copied into the view, and found there like any other
write. Step counts, and entries that are gone, are *edits*: all ranks must have made the same.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from shardopt._typing import FloatArray
from shardopt.comm.consensus import rank_list
from shardopt.errors import RankMismatchError
from shardopt.params.writes import Written
from shardopt.rule.nadam import StepCount

COUNT_KEYS = ("step", "mu_product")
RESET_KEY = "state"
EDIT_KEYS = frozenset((*COUNT_KEYS, RESET_KEY))
"""The keys of edits in what a rank has written; the value of a step count is its bits."""


@dataclass(frozen=True)
class ShownCounts:
    """The step counts of some parameters, in memory that users may write to.

    Attributes:
        first: Index of the first of them.
        values: By key, [num_params] each, as users see and change them.
        shown: The same as they were shown.
    """

    first: int
    values: Mapping[str, FloatArray]
    shown: Mapping[str, FloatArray]

    @property
    def stop(self) -> int:
        """Index behind the last of them."""
        return self.first + len(self.values["step"])

    def edited(self) -> Iterator[Written]:
        """Yield what users have changed."""
        for key in COUNT_KEYS:
            for offset in np.flatnonzero(self.values[key] != self.shown[key]):
                yield Written(self.first + int(offset), key)

    def show(self, counts: Sequence[StepCount]) -> None:
        """Show other values where users have not changed them."""
        for key in COUNT_KEYS:
            new = [getattr(count, key) for count in counts[self.first : self.stop]]
            is_shown = self.values[key] == self.shown[key]
            self.shown[key][:] = new
            self.values[key][is_shown] = self.shown[key][is_shown]

    def forget(self, index: int) -> None:
        """Drop what users have changed of a parameter."""
        for key in COUNT_KEYS:
            self.values[key][index - self.first] = self.shown[key][index - self.first]


class HandedOut:
    """Remembers at which step views were handed out, for as long as somebody holds them."""

    def __init__(self) -> None:
        self._version = -1
        self._now: WeakValueDictionary[int, Any] = WeakValueDictionary()
        self._before: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def add(self, value: Any, version: int) -> None:
        """Add a view that is handed out now."""
        self._turn_to(version)
        self._now[id(value)] = value

    def is_current(self, value: Any, version: int) -> bool | None:
        """Whether a view was handed out at the present step; None if it is not known."""
        self._turn_to(version)
        if self._now.get(id(value)) is value:
            return True
        return False if self._before.get(id(value)) is value else None

    def _turn_to(self, version: int) -> None:
        if version != self._version:
            self._before.update(self._now)
            self._now.clear()
            self._version = version


def agree_on_edits(
    everyone: Sequence[Mapping[Written, int]], names: Sequence[str]
) -> dict[Written, int]:
    """Compare the edits of all ranks; the same on every rank.

    Args:
        everyone: For each rank what it has written, edits among it; one entry if all are equal.
        names: Of the parameters.

    Raises:
        RankMismatchError: Ranks have made different ones.
    """
    edits = [{k: v for k, v in each.items() if k.key in EDIT_KEYS} for each in everyone]
    if all(each == edits[0] for each in edits):
        return edits[0]
    for edit in sorted(set().union(*edits)):
        ranks: dict[int | None, list[int]] = {}
        for rank, each in enumerate(edits):
            ranks.setdefault(each.get(edit), []).append(rank)
        if len(ranks) > 1:
            got = " and ".join(f"{_done(edit, v)} on {rank_list(r)}" for v, r in ranks.items())
            raise RankMismatchError(
                "all ranks must do the same to opt.state between steps; for parameter "
                f"{names[edit.param]!r} got {got}. Nothing has changed: do it on all ranks, or "
                "call opt.adopt(rank=...) on all of them for what one has done."
            )
    raise AssertionError("edits differ nowhere")


def _done(edit: Written, value: int | None) -> str:
    if edit.key == RESET_KEY:
        return "no reset" if value is None else "a reset of its state"
    return f"no new {edit.key}" if value is None else f"a {edit.key} of {number_of(value)}"


def bits_of(number: Any) -> int:
    """Return the bits of a number, for ``Written`` values."""
    bits: int = struct.unpack("<q", struct.pack("<d", float(number)))[0]
    return bits


def number_of(bits: int) -> float:
    """Return the number with some bits."""
    number: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return number
