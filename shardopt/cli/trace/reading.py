"""Traces, read from the files that ranks have written; see [Note: trace files].

Files of a folder belong to one run if their processes lived at the same time. Times are brought to
one clock: that of rank 0 of an optimizer, by what its ranks have measured.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardopt.errors import TraceError
from shardopt.trace_file import CLOCK, OPTIMIZER, PROCESS, SUFFIX

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Alignment:
    """The way from a process's clock to that of the run.

    Attributes:
        offsets: (time of the process, nanoseconds to be added), in order; between two of them the
            rest is interpolated.
        error_ns: The largest error; None if the clocks have not been compared.
    """

    offsets: Sequence[tuple[int, int]]
    error_ns: int | None

    def __call__(self, clock_ns: int) -> int:
        """Return the time in nanoseconds of the run's clock."""
        (first, offset), (last, other) = self.offsets[0], self.offsets[-1]
        if first < clock_ns < last:
            offset += (other - offset) * (clock_ns - first) // (last - first)
        elif clock_ns >= last:
            offset = other
        return clock_ns + offset


@dataclass(frozen=True)
class TraceFile:
    """The file of an optimizer on one rank.

    Attributes:
        path: The file.
        process: The rank in MPI_COMM_WORLD, host, process id, and the clocks.
        optimizer: A key that its ranks share, and the rank in it; empty if it was never built.
        clocks: The comparisons with the clock of the optimizer's rank 0.
        last_ns: When its last event ended, by the process's clock.
    """

    path: Path
    process: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    clocks: Sequence[Mapping[str, int]]
    last_ns: int

    @property
    def rank(self) -> int:
        """The rank in MPI_COMM_WORLD."""
        return int(self.process["rank"])

    @property
    def owner(self) -> tuple[str, int]:
        """The process that has written it."""
        return self.process["host"], self.process["os_pid"]

    @property
    def wall_offset_ns(self) -> int:
        """The nanoseconds from the process's clock to the wall clock of its host."""
        return int(self.process["wall_ns"] - self.process["clock_ns"])

    @property
    def lifetime(self) -> tuple[int, int]:
        """From the start of the process to the last event, by the wall clock of its host."""
        return self.process["born_ns"], self.last_ns + self.wall_offset_ns

    def world_rank(self, rank: int) -> int:
        """Return the rank in MPI_COMM_WORLD of a rank of the optimizer."""
        ranks = self.optimizer.get("ranks")
        return rank if ranks is None else int(ranks[rank])

    def events(self) -> Iterator[Event]:
        """Yield its events in the order in which they ended, with the times of the process."""
        return read_events(self.path)


@dataclass(frozen=True)
class Run:
    """The files of one job.

    Attributes:
        files: By rank, and by optimizer in the order in which they were built.
        alignments: One for each of the files.
    """

    files: Sequence[TraceFile]
    alignments: Sequence[Alignment]

    @property
    def ranks(self) -> list[int]:
        """The ranks that have traced."""
        return sorted({file.rank for file in self.files})

    @property
    def start_ns(self) -> int:
        """When the job began, by the wall clock."""
        return min(file.lifetime[0] for file in self.files)


def read_events(path: Path) -> Iterator[Event]:
    """Yield the events of a file, whose last line may be incomplete.

    Raises:
        TraceError: It is no trace, or damaged elsewhere.
    """
    broken = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            text = line.strip().rstrip(",")
            if text in ("", "[", "]"):
                continue
            if broken:
                raise TraceError(
                    f"{str(path)!r} must be a trace with an event per line; got something else in "
                    f"line {broken}. Remove the file, or trace again."
                )
            try:
                event = json.loads(text)
            except ValueError:
                broken = number
                continue
            if isinstance(event, dict) and {"ph", "name", "pid", "tid"} <= event.keys():
                yield event
            else:
                broken = number


def time_ns(event: Event, key: str = "ts") -> int:
    """Return a time of an event, which is in microseconds there."""
    return round(float(event[key]) * 1000)


def find_runs(folder: Path) -> list[Run]:
    """Find the runs whose traces are in a folder, oldest first.

    Raises:
        TraceError: There are none, or a file is no trace.
    """
    files = [file for path in sorted(folder.glob(f"*{SUFFIX}")) if (file := _scan(path))]
    if not files:
        raise TraceError(
            f"folder must hold traces; got {str(folder)!r}, which has none. Pass the folder of "
            "ShardPolicy(trace=...) or SHARDOPT_TRACE."
        )
    files.sort(key=lambda file: file.lifetime)
    groups: list[list[TraceFile]] = []
    end_ns = 0
    for file in files:
        if file.lifetime[0] > end_ns:
            groups.append([])
        groups[-1].append(file)
        end_ns = max(end_ns, file.lifetime[1])
    return [_make_run(folder, group) for group in groups]


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that chooses a run, as ``number``."""
    words = "of the runs in DIR, from 1 (default: the newest)"
    parser.add_argument("--run", type=int, dest="number", metavar="N", help=words)


def choose_run(folder: Path, number: int | None) -> tuple[Run, int, int]:
    """Return a run of a folder, its number and how many there are.

    Args:
        folder: The folder.
        number: Counted from 1, the oldest; None takes the newest.

    Raises:
        TraceError: There is no such run.
    """
    runs = find_runs(folder)
    chosen = len(runs) if number is None else number
    if not 1 <= chosen <= len(runs):
        raise TraceError(
            f"--run must be a number from 1 to {len(runs)}; got {number}. Leave it out for the "
            "newest."
        )
    return runs[chosen - 1], chosen, len(runs)


def _scan(path: Path) -> TraceFile | None:
    """Read the metadata of a file; None if it ends before there is any."""
    process: Mapping[str, Any] = {}
    optimizer: Mapping[str, Any] = {}
    clocks, last_ns = [], 0
    for event in read_events(path):
        name, args = event["name"], event.get("args", {})
        if name == PROCESS:
            process, last_ns = args, args["clock_ns"]
        elif name == OPTIMIZER:
            optimizer = args
        elif name == CLOCK:
            clocks.append(args)
        elif "ts" in event:
            last_ns = max(last_ns, time_ns(event) + round(event.get("dur", 0) * 1000))
    return TraceFile(path, process, optimizer, clocks, last_ns) if process else None


def _make_run(folder: Path, files: Sequence[TraceFile]) -> Run:
    """Align the clocks of a run; a process that several optimizers have traced is aligned once."""
    owners: dict[int, tuple[str, int]] = {}
    for file in files:
        if owners.setdefault(file.rank, file.owner) != file.owner:
            raise TraceError(
                f"{str(folder)!r} must hold one job at a time; got two that overlap, each with a "
                f"rank {file.rank}. Trace each job into a folder of its own."
            )
    ordered = sorted(files, key=lambda file: (file.rank, file.process["clock_ns"]))
    widest: dict[tuple[str, int], TraceFile] = {}
    for file in ordered:
        size = file.optimizer.get("world_size", 0)
        if file.owner not in widest or size > widest[file.owner].optimizer.get("world_size", 0):
            widest[file.owner] = file
    made = {owner: _align(file, ordered) for owner, file in widest.items()}
    return Run(ordered, [made[file.owner] for file in ordered])


def _align(file: TraceFile, files: Sequence[TraceFile]) -> Alignment:
    """Return the way from a file's clock to the wall clock of the optimizer's rank 0."""
    if not file.clocks:
        return Alignment([(0, file.wall_offset_ns)], None)
    key = file.optimizer.get("key")
    first = min(
        (each for each in files if each.clocks and each.optimizer.get("key") == key),
        key=lambda each: each.optimizer.get("rank", 0),
    )
    wall_ns = first.wall_offset_ns - first.clocks[0]["offset_ns"]
    offsets = [(clock["at_ns"], clock["offset_ns"] + wall_ns) for clock in file.clocks]
    return Alignment(offsets, max(clock["error_ns"] for clock in file.clocks))
