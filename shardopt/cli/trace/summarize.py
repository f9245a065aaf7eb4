"""Where the time of a run goes, and which rank makes others wait."""

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shardopt.cli.trace.reading import Alignment, Event, Run, TraceFile, time_ns

STEP, MEETING = "step", "consensus"
SAVES = ("save", "write_file", "hash", "write", "sync", "commit")
PHASES, INSIDE, BESIDE, OUTSIDE = "phase", "in a step", "beside steps", "between steps"


class Place(NamedTuple):
    """The row of a table of times: where a span is, and its name."""

    where: str
    name: str


@dataclass
class Time:
    """Time of spans of one name on one rank.

    Attributes:
        number: Of spans.
        total_ns: Their time.
        longest_ns: That of the longest.
    """

    number: int = 0
    total_ns: int = 0
    longest_ns: int = 0

    def add(self, duration_ns: int) -> None:
        """Count one more span."""
        self.number += 1
        self.total_ns += duration_ns
        self.longest_ns = max(self.longest_ns, duration_ns)


@dataclass
class RankTimes:
    """The times of one rank in the steps of all its optimizers.

    Attributes:
        num_steps: Steps that are counted: all but the first of each optimizer, if there are more.
        times: By place.
        saves: Likewise, of saves.
        late_ns: By rank, how long this rank waited for its messages.
        made_wait_ns: How long others waited for this rank where all meet, on average.
        num_last: Meetings to which this rank came last.
    """

    num_steps: int = 0
    times: dict[Place, Time] = field(default_factory=lambda: defaultdict(Time))
    saves: dict[str, Time] = field(default_factory=lambda: defaultdict(Time))
    late_ns: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    made_wait_ns: int = 0
    num_last: int = 0


@dataclass(frozen=True)
class Summary:
    """A run in figures.

    Attributes:
        ranks: By rank in MPI_COMM_WORLD.
        num_meetings: Meetings of all ranks whose order of arrival is known.
        num_undecided: Those at which ranks came closer together than clocks can tell.
        error_ns: The largest error of a clock; None if one was never compared.
    """

    ranks: dict[int, RankTimes]
    num_meetings: int
    num_undecided: int
    error_ns: int | None

    @property
    def num_steps(self) -> int:
        """Steps counted on the rank that has most of them."""
        return max((each.num_steps for each in self.ranks.values()), default=0)

    def places(self) -> list[Place]:
        """Return all places, those of a step first, and each part by its time."""
        parts = [STEP, PHASES, INSIDE, BESIDE, OUTSIDE]
        total = {place: self.mean_ns(place) for each in self.ranks.values() for place in each.times}
        return sorted(total, key=lambda place: (parts.index(place.where), -total[place]))

    def per_step_ns(self, place: Place) -> dict[int, float]:
        """Return the time of a place in a step, by rank."""
        return {
            rank: each.times[place].total_ns / each.num_steps if place in each.times else 0.0
            for rank, each in self.ranks.items()
            if each.num_steps
        }

    def mean_ns(self, place: Place) -> float:
        """Return the time of a place in a step, on average over ranks."""
        times = self.per_step_ns(place)
        return sum(times.values()) / len(times) if times else 0.0

    def waited_for_ns(self) -> dict[int, float]:
        """Return how long a rank waits for each of the others in a step, on average, by rank."""
        found = {}
        for rank, each in self.ranks.items():
            exchange_ns = sum(other.late_ns.get(rank, 0) for other in self.ranks.values())
            others = max(1, len(self.ranks) - 1)
            found[rank] = (each.made_wait_ns + exchange_ns / others) / max(1, each.num_steps)
        return found


def summarize(run: Run) -> Summary:
    """Read the files of a run, and add up."""
    ranks: dict[int, RankTimes] = {rank: RankTimes() for rank in run.ranks}
    arrivals: dict[str, list[tuple[int, int, array[int]]]] = defaultdict(list)
    for file, align in zip(run.files, run.alignments, strict=True):
        found = _read(file, align, ranks[file.rank])
        if key := file.optimizer.get("key"):
            arrivals[key].append((file.rank, align.error_ns or 0, found))
    num_meetings = num_undecided = 0
    for met in arrivals.values():
        decided, undecided = _attribute(met, ranks)
        num_meetings, num_undecided = num_meetings + decided, num_undecided + undecided
    errors = [align.error_ns for align in run.alignments]
    known = [error for error in errors if error is not None]
    error_ns = max(known) if len(known) == len(errors) else None
    return Summary(ranks, num_meetings, num_undecided, error_ns)


def _read(file: TraceFile, align: Alignment, into: RankTimes) -> "array[int]":
    """Add up one file; return when the rank came to each meeting of all steps but the first."""
    arrivals, steps = array("q"), _steps(file.events())
    first, num_before = next(steps, None), into.num_steps
    for step, spans in steps:
        _count(file, step, spans, into)
        arrivals.extend(align(time_ns(span)) for span in spans if _is_meeting(span, step))
    if first is not None and into.num_steps == num_before:
        _count(file, *first, into)
    for event in file.events():
        if event["ph"] == "X" and event["name"] in SAVES:
            into.saves[event["name"]].add(time_ns(event, "dur"))
    return arrivals


def _steps(events: Iterable[Event]) -> Iterator[tuple[Event, list[Event]]]:
    """Yield each step with all that has ended since the one before, but for saves."""
    since: list[Event] = []
    for event in _durations(events):
        if event["name"] == STEP:
            yield event, since
            since = []
        elif event["name"] not in SAVES:
            since.append(event)


def _durations(events: Iterable[Event]) -> Iterator[Event]:
    """Yield spans, and flights as if they were spans."""
    begun: dict[str, Event] = {}
    for event in events:
        if event["ph"] == "X":
            yield event
        elif event["ph"] == "b":
            begun[event["id"]] = event
        elif event["ph"] == "e" and event["id"] in begun:
            begin = begun.pop(event["id"])
            yield {**begin, "dur": event["ts"] - begin["ts"]}


def _count(file: TraceFile, step: Event, spans: Sequence[Event], into: RankTimes) -> None:
    """Add up a step."""
    into.num_steps += 1
    into.times[Place(STEP, STEP)].add(time_ns(step, "dur"))
    for span in spans:
        duration_ns = time_ns(span, "dur")
        into.times[Place(_where(span, step), span["name"])].add(duration_ns)
        late = [file.world_rank(rank) for rank in span["args"].get("ranks", ())]
        for rank in late:
            into.late_ns[rank] += duration_ns // len(late)


def _where(span: Event, step: Event) -> str:
    """Return where a span is that has ended since the step before."""
    if span["ph"] == "b" or span["tid"] != step["tid"]:
        return BESIDE
    if span["ts"] < step["ts"]:
        return OUTSIDE
    return PHASES if span["cat"] == "phase" else INSIDE


def _is_meeting(span: Event, step: Event) -> bool:
    return span["name"] == MEETING and _where(span, step) == INSIDE


def _attribute(
    met: Sequence[tuple[int, int, "array[int]"]], ranks: dict[int, RankTimes]
) -> tuple[int, int]:
    """Charge the time that ranks wait where all meet to the rank that comes last.

    Args:
        met: For each rank of an optimizer its number, the error of its clock, and when it came to
            each of the meetings, which are the same on all ranks, in the same order.
        ranks: Where that is noted.

    Returns:
        How many meetings had a last one, and how many were too close to tell.
    """
    if len(met) < 2:
        return 0, 0
    decided = undecided = 0
    for times in zip(*(times for _, _, times in met), strict=False):  # a killed rank has fewer
        order = sorted(range(len(met)), key=times.__getitem__)
        last, second = order[-1], order[-2]
        if times[last] - times[second] <= met[last][1] + met[second][1]:
            undecided += 1
            continue
        decided += 1
        waited = sum(times[last] - times[each] for each in order[:-1])
        late = ranks[met[last][0]]
        late.num_last += 1
        late.made_wait_ns += waited // (len(met) - 1)
    return decided, undecided
