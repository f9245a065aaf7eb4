"""Plots of strong and weak scaling, readable on light and on dark pages."""

from collections.abc import Sequence

from benchmarks.cases.scaling import LIMIT, STRONG
from benchmarks.cases.scaling.groups import BY_NODE
from benchmarks.contenders.internals import Chart, draw
from benchmarks.contenders.internals import Series as Line
from benchmarks.contenders.names import (
    BEHIND_BACKWARD,
    DDP,
    FSDP2,
    OPTAX,
    REDUCE_SCATTER,
    SHARDOPT,
    ZERO_REDUNDANCY,
)
from benchmarks.harness.result import Result
from benchmarks.report.scaling import Series, heading, is_oversubscribed, origin, series_of

_NAMES = {
    SHARDOPT: ("shardopt", 0),
    REDUCE_SCATTER: ("reduce-scatter", 1),
    ZERO_REDUNDANCY: ("ZeroRedundancy", 2),
    BEHIND_BACKWARD: ("shardopt.torch", 5),
    DDP: ("DDP", 3),
    FSDP2: ("FSDP2", 6),
    OPTAX: ("optax, all-reduce", 4),
}
_COLORS = """  .s5 { stroke: #0550ae; } .t5 { fill: #0550ae; }
  .s6 { stroke: #bf3989; } .t6 { fill: #bf3989; }
  @media (prefers-color-scheme: dark) {
    .s5 { stroke: #6cb6ff; } .t5 { fill: #6cb6ff; }
    .s6 { stroke: #ff80c8; } .t6 { fill: #ff80c8; }
  }
"""
_IDEAL = "ideal"
_GRAY = 4


def draw_scaling(results: Sequence[Result], mode: str) -> str | None:
    """Return the plot of the newest job of a mode as SVG, or None if there is too little to see.

    Oversubscribed numbers of ranks are left out.

    Args:
        results: Those of the case ``scaling``.
        mode: ``STRONG`` or ``WEAK``.
    """
    shown = []
    for series in series_of(results, mode):
        kept = tuple(result for result in series.results if not is_oversubscribed(result))
        if len(kept) > 1:
            shown.append(Series(mode, series.by, kept))
    if not shown:
        return None
    first = shown[0].results[0]
    rounds = len(first.samples_s[SHARDOPT])
    notes = [
        f"{origin(first)}.",
        f"The slowest rank, median of {rounds} interleaved rounds. Dashed: {_IDEAL} scaling of "
        "shardopt, and the limit of memory and links.",
    ]
    title = heading(shown[0]).replace(f" by {shown[0].by}", "")
    return draw(title, list(map(_chart, shown)), notes, _COLORS)


def _chart(series: Series) -> Chart:
    xs = [series.size(result) for result in series.results]
    lines = [
        Line(words, xs, [1e3 * result.value(name) for result in series.results], color)
        for name, (words, color) in _NAMES.items()
        if all(result.has(name) for result in series.results)
    ]
    first_ms = lines[0].ys[0]
    ideal = [first_ms * xs[0] / x if series.mode == STRONG else first_ms for x in xs]
    limit = [1e3 * result.value(LIMIT) for result in series.results]
    lines += [
        Line(_IDEAL, xs, ideal, 0, is_thin=True),
        Line("limit", xs, limit, _GRAY, is_thin=True),
    ]
    unit = "nodes" if series.by == BY_NODE else "ranks"
    return Chart(f"step, ms, by {series.by}", unit, lines, lambda ms: f"{ms:g}", ticks=xs)
