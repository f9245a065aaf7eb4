"""Traces of tests: read whole, looked into, and made by hand."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from shardopt.trace_file import CLOCK, OPTIMIZER, PROCESS, ROWS, SUFFIX, EventFile

_BASE_US = 4_000_000_000  # where rank 0's clock stands when the process begins


def read(folder: Path, rank: int | None = None) -> list[dict[str, Any]]:
    """Return the events of closed files of a folder, by strict JSON."""
    name = f"*{SUFFIX}" if rank is None else f"rank{rank:05}-*{SUFFIX}"
    return [
        event
        for path in sorted(folder.glob(name))
        for event in json.loads(path.read_text(encoding="utf-8"))
    ]


def spans(events: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Return the spans among events, or those of some names."""
    return [each for each in events if each["ph"] == "X" and (not names or each["name"] in names)]


def assert_nested(events: list[dict[str, Any]]) -> None:
    """Of any two spans of a thread, one must contain the other, or they must not overlap."""
    rows = defaultdict(list)
    for span in spans(events):
        start = round(span["ts"] * 1000)
        rows[span["pid"], span["tid"]].append((start, -(start + round(span["dur"] * 1000)), span))
    assert rows
    for row in rows.values():
        open_ends: list[int] = []
        for start, end, span in sorted(row, key=lambda each: each[:2]):
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert not open_ends or -end <= open_ends[-1], span
            open_ends.append(-end)


class MadeTrace:
    """A file made by hand, with times in microseconds of a clock of its own.

    Args:
        folder: Where it is.
        rank: The rank.
        offset_us: How far its clock is behind that of rank 0.
        error_us: The error of that.
        born_us: When the process began, by the wall clock.
    """

    def __init__(
        self, folder: Path, rank: int, offset_us: int = 0, error_us: int = 0, born_us: int = 0
    ) -> None:
        self.path = folder / f"rank{rank:05}-{born_us}-1{SUFFIX}"
        self._file = EventFile(self.path, rank, 1 << 30)
        self._shift_us = _BASE_US - offset_us
        clocks = {"clock_ns": self._ns(0), "wall_ns": (born_us + 7 * rank) * 1000}
        process = {"rank": rank, "host": "node", "os_pid": 100 + rank, "born_ns": born_us * 1000}
        self._meta(PROCESS, {"format": 1, **process, **clocks})
        offset = {"offset_ns": offset_us * 1000, "error_ns": error_us * 1000}
        self._meta(CLOCK, {"at_ns": self._ns(0), **offset})
        self._meta(OPTIMIZER, {"key": "a", "rank": rank, "world_size": 2, "ranks": None})

    def span(self, name: str, start_us: int, end_us: int, **args: Any) -> None:
        """Add a span, with times of rank 0's clock."""
        kind = args.pop("kind", "span")
        self._file.record(
            (ROWS.mine(), "X", name, self._ns(start_us), self._ns(end_us), kind, args)
        )

    def close(self) -> None:
        """Complete the file."""
        self._file.close()

    def _ns(self, at_us: int) -> int:
        return (at_us + self._shift_us) * 1000

    def _meta(self, name: str, args: Any) -> None:
        self._file.record((ROWS.mine(), "M", name, 0, 0, "", args))
