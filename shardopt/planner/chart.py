"""Line charts as SVG, readable on light and on dark pages."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 480, 330  # of a chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 132, 52, 48  # around its axes
_HEADING, _FOOT, _LINE = 34, 16, 15
_LABEL_GAP = 14
_MARGIN, _LETTER = 16, 6.8  # beside notes, and the width of their letters

_STYLE = """
  svg { color-scheme: light dark; font: 12px system-ui, sans-serif; }
  .page { fill: #ffffff; } text { fill: #24292f; } .pale { fill: #57606a; }
  .grid { stroke: #d8dee4; } .area { fill: #afb8c1; opacity: .22; }
  .line { fill: none; stroke-width: 2; } .thin { stroke-width: 1.3; stroke-dasharray: 5 4; }
  .heading { font-weight: 600; font-size: 15px; } .title { font-weight: 600; font-size: 13px; }
  .band { opacity: .25; stroke: none; }
  .s0 { stroke: #0b7a75; } .b0, .t0 { fill: #0b7a75; } .s1 { stroke: #c2410c; }
  .b1, .t1 { fill: #c2410c; } .s2 { stroke: #6639ba; } .b2, .t2 { fill: #6639ba; }
  .s3 { stroke: #9a6700; } .b3, .t3 { fill: #9a6700; } .s4 { stroke: #57606a; }
  .b4, .t4 { fill: #57606a; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; } text { fill: #e6edf3; } .pale { fill: #9198a1; }
    .grid { stroke: #30363d; } .area { fill: #656c76; }
    .s0 { stroke: #39c5bb; } .b0, .t0 { fill: #39c5bb; } .s1 { stroke: #ff9b6a; }
    .b1, .t1 { fill: #ff9b6a; } .s2 { stroke: #c297ff; } .b2, .t2 { fill: #c297ff; }
    .s3 { stroke: #e3b341; } .b3, .t3 { fill: #e3b341; } .s4 { stroke: #9198a1; }
    .b4, .t4 { fill: #9198a1; }
  }
"""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Attributes:
        name: Written at its end.
        xs: Positions, all > 0.
        ys: Values, all > 0.
        color: The number of its color, from 0.
        is_thin: Whether it is dashed, as limits and other people's formulas are.
        low: The lower edge of a band around it, or empty.
        high: The upper edge, likewise.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 0
    is_thin: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with two logarithmic axes.

    Attributes:
        title: Its heading.
        x_name: Under the horizontal axis.
        series: The lines.
        show: Formats a value of the vertical axis.
        shaded_from: Where an area begins that is shaded up to the right edge, or None.
        shaded_name: Written into it.
    """

    title: str
    x_name: str
    series: Sequence[Series]
    show: Callable[[float], str]
    shaded_from: float | None = None
    shaded_name: str = ""
    ticks: Sequence[float] = field(default=(1, 4, 16, 64, 256, 1024, 4096))


def draw(heading: str, charts: Sequence[Chart], notes: Sequence[str], colors: str = "") -> str:
    """Return charts side by side as an SVG document.

    Args:
        heading: Above all of them.
        charts: From left to right.
        notes: Lines below them; those too long for the width are broken.
        colors: Style of further colors, as ``.s5 { stroke: ... } .t5 { fill: ... }``.
    """
    width = _WIDTH * len(charts)
    num_letters = int((width - 2 * _MARGIN) / _LETTER)
    notes = [line for note in notes for line in textwrap.wrap(note, num_letters)]
    height = _HEADING + _HEIGHT + _FOOT + _LINE * len(notes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">',
        f"<title>{escape(heading)}</title>",
        f"<style>{_STYLE}{colors}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
        _text(16, 25, heading, "heading"),
    ]
    for number, chart in enumerate(charts):
        parts.append(f'<g transform="translate({_WIDTH * number} {_HEADING})">')
        parts += _Axes(chart).draw()
        parts.append("</g>")
    for number, note in enumerate(notes):
        parts.append(_text(16, _HEADING + _HEIGHT + _LINE * (number + 1), note, "pale"))
    return "\n".join([*parts, "</svg>\n"])


class _Axes:
    """The axes of a chart, and what is drawn between them."""

    def __init__(self, chart: Chart) -> None:
        self._chart = chart
        xs = [x for series in chart.series for x in series.xs]
        ys = [y for s in chart.series for values in (s.ys, s.low, s.high) for y in values]
        self._xs = min(xs), max(max(xs), 2 * min(xs))
        self._ys = min(ys) / 1.25, max(ys) * 1.25
        self._bottom = _HEIGHT - _BOTTOM

    def draw(self) -> list[str]:
        """Return the elements, from back to front."""
        chart = self._chart
        parts = [_text(16, 22, chart.title, "title"), *self._shade()]
        for value in _ticks(*self._ys):
            y = self._y(value)
            parts.append(_line(_LEFT, y, _WIDTH - _RIGHT, y))
            parts.append(_text(_LEFT - 6, y + 4, chart.show(value), "pale", "end"))
        below = self._bottom + 17
        parts += [
            _text(self._x(value), below, f"{value:g}", "pale", "middle")
            for value in chart.ticks
            if self._xs[0] <= value <= self._xs[1]
        ]
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(_text(middle, self._bottom + 36, chart.x_name, "pale", "middle"))
        for series in chart.series:
            parts += self._draw_series(series)
        return parts + self._names()

    def _shade(self) -> list[str]:
        start = self._chart.shaded_from
        if start is None or start >= self._xs[1]:
            return []
        x, width = self._x(max(start, self._xs[0])), _WIDTH - _RIGHT - _LEFT
        area = (
            f'<rect class="area" x="{x:.1f}" y="{_TOP}" width="{_LEFT + width - x:.1f}" '
            f'height="{self._bottom - _TOP}"/>'
        )
        return [area, _text(x + 5, _TOP - 6, self._chart.shaded_name, "pale")]

    def _draw_series(self, series: Series) -> list[str]:
        parts = []
        if series.low:
            there = self._points(series.xs, series.high)
            back = self._points(series.xs, series.low)[::-1]
            points = " ".join(there + back)
            parts.append(f'<polygon class="band b{series.color}" points="{points}"/>')
        thin = " thin" if series.is_thin else ""
        points = " ".join(self._points(series.xs, series.ys))
        return [*parts, f'<polyline class="line s{series.color}{thin}" points="{points}"/>']

    def _names(self) -> list[str]:
        """Write the name of each line at its end, none over another."""
        ends = [(self._y(series.ys[-1]), series) for series in self._chart.series]
        ends.sort(key=lambda end: end[0])
        places: list[float] = []
        for y, _ in ends:
            places.append(max(y, places[-1] + _LABEL_GAP) if places else y)
        excess = max(0.0, places[-1] - self._bottom)
        return [
            _text(_WIDTH - _RIGHT + 6, place - excess + 4, series.name, f"t{series.color}")
            for place, (_, series) in zip(places, ends, strict=True)
        ]

    def _points(self, xs: Sequence[float], ys: Sequence[float]) -> list[str]:
        return [f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in zip(xs, ys, strict=True)]

    def _x(self, value: float) -> float:
        first, last = self._xs
        return _LEFT + math.log(value / first, last / first) * (_WIDTH - _RIGHT - _LEFT)

    def _y(self, value: float) -> float:
        first, last = self._ys
        return self._bottom - math.log(value / first, last / first) * (self._bottom - _TOP)


def _ticks(first: float, last: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten in a range; fewer if they are many."""
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    for steps in ((1, 2, 5), (1,)):
        found = [step * 10.0**power for power in powers for step in steps]
        kept = [value for value in found if first <= value <= last]
        if len(kept) <= 8:
            break
    return kept


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="grid" {place}/>'
