"""Runs of elements."""

import builtins
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The elements [start, stop) of something flat: the index space, a region, a parameter, a file.

    What the positions count from is said where a span is handed over. Subclasses add what else is
    known of the run; what the methods return are plain spans.
    """

    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        """The span as an index."""
        return slice(self.start, self.stop)

    def __bool__(self) -> bool:
        return self.stop > self.start

    def __contains__(self, position: int) -> bool:
        return self.start <= position < self.stop

    def trace_args(self) -> Mapping[str, object]:
        """Return what a trace shows of it."""
        return {"start": self.start, "stop": self.stop}

    def shift(self, offset: int) -> "Span":
        """Return the span ``offset`` elements further on."""
        return Span(self.start + offset, self.stop + offset)

    def intersect(self, other: "Span") -> "Span":
        """Return the elements of both; an empty span if there are none."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))

    def scale(self, factor: int) -> "Span":
        """Return the span in a unit that is ``factor`` times smaller: elements as bytes."""
        return Span(self.start * factor, self.stop * factor)

    def index_in(self, outer: "Span") -> builtins.slice:
        """Return the span as an index into an array that holds the elements of ``outer``."""
        return builtins.slice(self.start - outer.start, self.stop - outer.start)

    def within(self, outer: "Span") -> "Span":
        """Return the span with its positions counted from the start of ``outer``."""
        return Span(self.start - outer.start, self.stop - outer.start)

    def cut(self, index: int, parts: int, unit: int = 1) -> "Span":
        """Return part ``index`` of ``parts``, shared out evenly in whole units.

        Args:
            index: Which part, from 0.
            parts: How many there are.
            unit: Number of elements that stay together; divides ``numel``.
        """
        units = self.numel // unit
        first, last = units * index // parts, units * (index + 1) // parts
        return Span(self.start + first * unit, self.start + last * unit)

    def chunks(self, numel: int) -> Iterator["Span"]:
        """Yield the span in runs of ``numel`` elements, the last of which may be shorter."""
        for start in range(self.start, self.stop, numel):
            yield Span(start, min(start + numel, self.stop))


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the fewest spans that cover some, in order."""
    runs: list[Span] = []
    for span in sorted(spans, key=lambda each: each.start):
        if runs and span.start <= runs[-1].stop:
            runs[-1] = Span(runs[-1].start, max(runs[-1].stop, span.stop))
        elif span:
            runs.append(span)
    return runs


def without(whole: Span, taken: Iterable[Span]) -> list[Span]:
    """Return what is left of a span, in order.

    Args:
        whole: The span.
        taken: What is taken away; no two of them overlap.
    """
    left, start = [], whole.start
    for span in sorted((span for span in taken if span), key=lambda each: each.start):
        if part := Span(start, min(span.start, whole.stop)):
            left.append(part)
        start = max(start, span.stop)
    if start < whole.stop:
        left.append(Span(start, whole.stop))
    return left


def intersections(left: Sequence[Span], right: Sequence[Span]) -> list[Span]:
    """Return the intersections of two lists of spans, each in order and without overlap."""
    found, ours, theirs = [], iter(left), iter(right)
    one, other = next(ours, None), next(theirs, None)
    while one is not None and other is not None:
        if both := one.intersect(other):
            found.append(both)
        if one.stop <= other.stop:
            one = next(ours, None)
        else:
            other = next(theirs, None)
    return found
