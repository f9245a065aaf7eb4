"""Edits of the optimizer state: those of this rank's user, and those of all users.

[Note: what users do to the state]
Arrays of the state are views that this rank may write to: see [Note: weights that behave as in
DDP]. Another array put in the place of one is copied into the view, and found there like any other
write. Step counts, and entries that are gone, are *edits*: all ranks must have made the same.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from shardopt.comm.consensus import rank_list
from shardopt.errors import RankMismatchError
from shardopt.params.writes import Written
from shardopt.rule.coefficients import StepCount

COUNT_KEYS = ("step", "mu_product")
RESET_KEY = "state"
EDIT_KEYS = frozenset((*COUNT_KEYS, RESET_KEY))
"""The keys of edits in what a rank has written; the value of a step count is its bits."""


@dataclass
class StateNotes:
    """The changes of this rank's user to entries of the state since the last step.

    Attributes:
        expected: The parameters that have an entry unless a user removes it, by number.
        dirty: Those whose entries were written to, replaced or removed.
        resets: Those whose entries are gone.
        surplus: Parameters that have an entry and are not the optimizer's, or not yet.
    """

    expected: set[int] = field(default_factory=set)
    dirty: dict[int, None] = field(default_factory=dict)
    resets: set[int] = field(default_factory=set)
    surplus: list[Any] = field(default_factory=list)

    def rearrange(self, moves: Mapping[int, int]) -> None:
        """Follow parameters to their new numbers.

        Args:
            moves: The new number of each parameter that stays, by the number so far.
        """
        self.expected = {moves[index] for index in self.expected if index in moves}
        self.resets = {moves[index] for index in self.resets if index in moves}
        self.dirty = {moves[index]: None for index in self.dirty if index in moves}


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


def changed_counts(counts: Sequence[StepCount], edits: Mapping[Written, int]) -> list[StepCount]:
    """Return step counts as they are after some edits.

    Args:
        counts: One for each parameter.
        edits: The edits, with the bits of each new count.
    """
    changed = list(counts)
    for (index, key), bits in edits.items():
        step, mu_product = changed[index].step, changed[index].mu_product
        if key == RESET_KEY:
            changed[index] = StepCount()
        elif key == "step":
            changed[index] = StepCount(int(number_of(bits)), mu_product)
        else:
            changed[index] = StepCount(step, number_of(bits))
    return changed


def bits_of(number: Any) -> int:
    """Return the bits of a number, for ``Written`` values."""
    bits: int = struct.unpack("<q", struct.pack("<d", float(number)))[0]
    return bits


def number_of(bits: int) -> float:
    """Return the number with some bits."""
    number: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return number
