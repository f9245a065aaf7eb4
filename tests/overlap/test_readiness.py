"""Counting which buckets have all their gradients."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt.overlap.readiness import Readiness


def make(params_of, num_params, *counts):
    """A layout that has seen a step in which each parameter got ``counts`` gradients."""
    readiness = Readiness()
    readiness.extend(params_of, num_params)
    readiness.start_step()
    for param, count in enumerate(counts):
        for _ in range(count):
            readiness.count(param)
    readiness.start_step()
    return readiness


def accumulate(readiness, param):
    left = readiness.count(param)
    if left == 0:
        readiness.mark_ready(param)
    return left


def test_nothing_counts_before_the_first_step_has_shown_what_to_expect():
    readiness = Readiness()
    readiness.extend([[0, 1]], 2)
    readiness.start_step()
    assert readiness.count(0) == -1
    assert readiness.is_counting


def test_micro_batches_are_awaited():
    readiness = make([[0], [1]], 2, 2, 2)
    assert [accumulate(readiness, 0) for _ in range(3)] == [1, 0, -1]
    assert readiness.num_ready() == 1


def test_unused_parameters_hold_up_nothing_and_are_named():
    readiness = make([[0, 1], [1, 2]], 3, 1, 0, 1)
    assert list(readiness.unused_in(0)) == [1]
    assert list(readiness.unused_in(1)) == []
    accumulate(readiness, 0)
    assert readiness.num_ready() == 1
    accumulate(readiness, 2)
    assert readiness.num_ready() == 2


def test_buckets_are_announced_without_a_gap():
    readiness = make([[0], [1], [2]], 3, 1, 1, 1)
    accumulate(readiness, 2)
    accumulate(readiness, 1)
    assert readiness.num_ready() == 0
    accumulate(readiness, 0)
    assert readiness.num_ready() == 3
    assert readiness.num_ready(first=1) == 3


def test_masks_and_params_of_what_was_announced():
    readiness = make([[0], [0, 1], [2]], 4, 1, 1, 1, 1)
    assert readiness.mask_of(0, 3) == 0b011
    assert readiness.mask_of(0, 1) == 0b001
    assert readiness.mask_of(3, 3) == 0
    assert list(readiness.params_before(0)) == []
    assert list(readiness.params_before(1)) == [0]
    assert list(readiness.params_before(2)) == [0, 1]


def test_parameters_that_are_added_are_expected_from_the_next_step_on():
    readiness = make([[0]], 1, 1)
    readiness.extend([[1], [0]], 2)
    assert readiness.knows(1)
    readiness.start_step()
    assert list(readiness.unused_in(0)) == [1]


layouts = st.lists(st.lists(st.integers(0, 5), max_size=4, unique=True), max_size=6)


@given(layouts, st.lists(st.integers(0, 3), min_size=6, max_size=6), st.randoms())
@settings(max_examples=60)
def test_a_step_like_the_one_before_makes_every_bucket_ready(params_of, counts, order):
    readiness = make(params_of, 6, *counts)
    calls = [param for param, count in enumerate(counts) for _ in range(count)]
    order.shuffle(calls)
    seen = [readiness.num_ready()]
    for param in calls:
        assert accumulate(readiness, param) >= 0
        seen.append(readiness.num_ready(seen[-1]))
    assert seen == sorted(seen)
    assert seen[-1] == len(params_of)
