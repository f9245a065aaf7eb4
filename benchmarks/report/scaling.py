"""Strong and weak scaling on one page of a terminal, in Markdown, and as plots."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cases.scaling import (
    COUNTS,
    DISK_RATE,
    LIMIT,
    LINK_RATE,
    MEASURED,
    MEMORY_RATE,
    MESSAGES,
    OURS_FOR,
    PEERS,
    PLANNED_MB,
    PLANNED_MESSAGES,
    REPORTED,
    SENT_MB,
    STRONG,
    WEAK,
)
from benchmarks.cases.scaling.groups import BY_NODE, BY_RANK
from benchmarks.contenders.names import SHARDOPT
from benchmarks.harness.result import Result

PART = "scaling"
"""The part of a Markdown file that has the tables."""

_COLUMNS = 5  # numbers of ranks side by side
_NAME, _CELL = 40, 22
_MARK = " *"


@dataclass(frozen=True)
class Series:
    """The results of one job that differ in their ranks only, the fewest first.

    Attributes:
        mode: ``STRONG``, ``WEAK`` or ``COUNTS``.
        by: ``BY_RANK`` or ``BY_NODE``.
        results: One for each number of ranks, or of whole nodes.
    """

    mode: str
    by: str
    results: tuple[Result, ...]

    def size(self, result: Result) -> int:
        """Return the number of ranks, or of nodes, of a result."""
        return int(result.settings["nodes"]) if self.by == BY_NODE else result.ranks

    def efficiency(self, result: Result, name: str) -> float:
        """Return the share of the time that is well spent, against the fewest ranks or nodes.

        Strong scaling: ``T1 n1 / (Tn n)``. Weak scaling: ``T1 / Tn``.
        """
        first = self.results[0]
        gained = first.value(name) / result.value(name)
        if self.mode == WEAK:
            return gained
        return gained * self.size(first) / self.size(result)

    def names(self) -> list[str]:
        """Return the contenders that were measured, this project first."""
        return [name for name in (SHARDOPT, *PEERS) if self.results[0].has(name)]


def series_of(results: Sequence[Result], mode: str) -> list[Series]:
    """Return the newest job's results of one mode, by rank and by node.

    That by node is left out where it is the same: on a single node, or with one rank on each.
    """
    chosen = [result for result in results if result.settings["scaling"] == mode]
    last = max((result.origin.date for result in chosen), default="")
    job = sorted(
        (result for result in chosen if result.origin.date == last),
        key=lambda result: result.ranks,
    )
    found: list[Series] = []
    for by in (BY_RANK, BY_NODE):
        kept = tuple(result for result in job if by in result.settings["by"].split(" and "))
        if kept and (by == BY_RANK or (len(kept) > 1 and kept != found[0].results)):
            found.append(Series(mode, by, kept))
    return found


def page(results: Sequence[Result]) -> str:
    """Write one page about a run: a table for strong scaling, one for weak scaling, or counts."""
    parts = []
    for mode in (STRONG, WEAK):
        parts += [_table(series) for series in series_of(results, mode)]
    counted = [result for result in results if result.settings["scaling"] == COUNTS]
    if counted:
        parts.append(_counts(counted))
    if results:
        parts.append(_about(results))
    return "\n" + "\n\n".join(parts)


def heading(series: Series) -> str:
    """Return a title: the mode, and the size of the model."""
    first = series.results[0]
    if series.mode == WEAK:
        size = f"{_mega(first.numel / first.ranks)} {first.dtype} parameters for each rank"
    else:
        size = f"{_mega(first.numel)} {first.dtype} parameters"
    return f"{series.mode.capitalize()} scaling by {series.by}: {size}"


def _table(series: Series) -> str:
    rounds = len(series.results[0].samples_s[SHARDOPT])
    lines = [
        heading(series),
        f"ms of a step (efficiency): the slowest rank, median of {rounds}; "
        f"{series.results[0].threads} thread(s) a rank",
    ]
    for start in range(0, len(series.results), _COLUMNS):
        block = series.results[start : start + _COLUMNS]
        lines.append(f"  {'':<{_NAME}}" + "".join(f"{label(r):>{_CELL}}" for r in block))
        for name in (*series.names(), LIMIT):
            shown = name.removesuffix(", s")
            cells = [cell(series, result, name) for result in block]
            lines.append(f"  {shown:<{_NAME}}" + "".join(f"{text:>{_CELL}}" for text in cells))
    last = series.results[-1]
    lines += [f"  {words} on {label(last).removesuffix(_MARK)}" for words in _ratios(last)]
    lines += [f"  {name}: left out, {why}" for name, why in last.left_out.items()]
    if any(map(is_oversubscribed, series.results)):
        lines.append(f" {_MARK} oversubscribed: more threads than cores; not in plots")
    return "\n".join(lines)


def _ratios(result: Result) -> list[str]:
    """Return how many times as long as this project each peer takes."""
    return [
        f"{f'{name} / {ours}':<{_NAME + _CELL}} {result.value(name) / result.value(ours):.1f}"
        for name, ours in OURS_FOR.items()
        if result.has(name) and result.has(ours)
    ]


def label(result: Result) -> str:
    """Return the ranks and nodes of a result in words, with a mark if it is oversubscribed."""
    nodes = result.settings["nodes"]
    words = f"{result.ranks} rank{'s' if result.ranks > 1 else ''}"
    words += f", {nodes} nodes" if nodes > 1 else ""
    return words + (_MARK if is_oversubscribed(result) else "")


def cell(series: Series, result: Result, name: str) -> str:
    """Return the milliseconds of a contender and its efficiency."""
    return f"{1e3 * result.value(name):.3g} ({series.efficiency(result, name):.0%})"


def is_oversubscribed(result: Result) -> bool:
    """Return whether its ranks had more threads than cores."""
    return bool(result.settings.get("oversubscribed"))


def _counts(results: Sequence[Result]) -> str:
    first = results[0]
    lines = [
        f"Sent in a step, and memory: {_mega(first.numel)} {first.dtype} parameters, ranks that "
        "may have no cores",
        f"  {'ranks':>6}{'nodes':>7}{'MB sent by a node':>20}{'(planned)':>12}"
        f"{'messages of a rank':>20}{'(planned)':>11}{'bytes/parameter':>17}{'(reported)':>12}",
    ]
    for result in results:
        sent, planned, messages, expected, measured, reported = map(
            result.value, (SENT_MB, PLANNED_MB, MESSAGES, PLANNED_MESSAGES, MEASURED, REPORTED)
        )
        lines.append(
            f"  {result.ranks:>6}{result.settings['nodes']:>7}{sent:>20.3f}{planned:>12.3f}"
            f"{messages:>20.0f}{expected:>11.0f}{measured:>17.2f}{reported:>12.2f}"
        )
    return "\n".join(lines)


def _about(results: Sequence[Result]) -> str:
    """Return the limits of the machine, and where results come from."""
    last = results[-1]
    lines = [
        f"{name}: {last.value(key):.3g} {unit}"
        for key in (MEMORY_RATE, LINK_RATE, DISK_RATE)
        for name, unit in [key.rsplit(", ", 1)]
        if last.has(key)
    ]
    loudest = max(result.others or 0.0 for result in results)
    if loudest:
        lines.append(f"other jobs took up to {loudest:.0%} of the cores")
    return "\n".join([*lines, origin(last)])


def origin(result: Result) -> str:
    """Return where a result comes from."""
    made, machine = result.origin, result.origin.machine
    return (
        f"{made.mpi}, {machine['cpu']}, {machine['cores']} cores, {made.date[:10]}, {made.commit}"
    )


def markdown(results: Sequence[Result]) -> str:
    """Write the newest series as Markdown tables."""
    shown = [series for mode in (STRONG, WEAK) for series in series_of(results, mode)]
    if not shown:
        return ""
    about = (
        "Milliseconds of a step, in parentheses the efficiency. \\* has more threads than cores. "
        f"{origin(shown[-1].results[-1])}."
    )
    return "\n\n".join([*map(_markdown, shown), about])


def _markdown(series: Series) -> str:
    labels = [label(result).replace(_MARK, " \\*") for result in series.results]
    rows = [
        [name.removesuffix(", s"), *(cell(series, result, name) for result in series.results)]
        for name in (*series.names(), LIMIT)
    ]
    head = [[heading(series), *labels], ["---", *["---:"] * len(labels)]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*head, *rows])


def _mega(count: float) -> str:
    return f"{count / 2**20:.3g} Mi" if count >= 1 << 19 else f"{count:,.0f}"
