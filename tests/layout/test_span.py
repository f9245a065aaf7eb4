"""Spans behave as the sets of positions that they are."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shardopt.layout.span import Span, intersections, merged

spans = st.tuples(st.integers(-50, 50), st.integers(0, 40)).map(lambda p: Span(p[0], p[0] + p[1]))


def positions(span):
    return set(range(span.start, span.stop))


@given(spans, spans)
def test_the_intersection_holds_what_is_in_both(one, other):
    both = one.intersect(other)
    assert positions(both) == positions(one) & positions(other)
    assert both.numel == len(positions(both))
    assert bool(both) == bool(positions(one) & positions(other))


@given(spans, st.integers(-100, 100))
def test_shifting_moves_every_position(span, offset):
    assert positions(span.shift(offset)) == {position + offset for position in positions(span)}


@given(spans, st.integers(1, 9), st.integers(1, 7))
def test_parts_are_even_and_cover_the_span(span, parts, unit):
    span = Span(span.start, span.start + span.numel // unit * unit)
    cuts = [span.cut(index, parts, unit) for index in range(parts)]
    assert [p for part in cuts for p in range(part.start, part.stop)] == sorted(positions(span))
    units = [part.numel // unit for part in cuts]
    assert all(part.numel % unit == 0 for part in cuts)
    assert max(units) - min(units) <= 1


@given(spans, st.integers(1, 9))
def test_chunks_cover_the_span_and_only_the_last_is_shorter(span, numel):
    chunks = list(span.chunks(numel))
    assert [p for chunk in chunks for p in range(chunk.start, chunk.stop)] == sorted(
        positions(span)
    )
    assert all(chunk.numel == numel for chunk in chunks[:-1])


@given(spans, st.integers(-60, 100))
def test_an_index_selects_the_positions(span, position):
    assert (position in span) == (position in positions(span))
    moved = span.shift(100)
    assert list(range(300)[moved.slice]) == sorted(positions(moved))


@given(st.lists(spans))
def test_merged_spans_are_the_fewest_with_the_same_positions(some):
    runs = merged(some)
    assert all(runs)
    assert all(one.stop < other.start for one, other in pairwise(runs))
    assert set().union(*map(positions, runs)) == set().union(*map(positions, some))


@given(st.lists(spans).map(merged), st.lists(spans).map(merged))
def test_intersections_have_the_positions_that_both_lists_have(left, right):
    found = intersections(left, right)
    assert all(found)
    assert found == sorted(found)
    ours, theirs = (set().union(*map(positions, each)) for each in (left, right))
    assert [p for span in found for p in range(span.start, span.stop)] == sorted(ours & theirs)
