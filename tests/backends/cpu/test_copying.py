"""Copies past the cache are copies, wherever they begin and end."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardopt.backends.cpu.copying import copy_past_cache

bounds = st.integers(0, 300)


@given(target_start=bounds, source_start=bounds, size=bounds)
def test_exactly_the_bytes_asked_for_are_copied(target_start, source_start, size):
    source = np.random.default_rng(size).integers(0, 256, 700, np.uint8)
    target = np.full(700, 9, np.uint8)
    expected = target.copy()
    expected[target_start : target_start + size] = source[source_start : source_start + size]
    copy_past_cache(
        target[target_start : target_start + size], source[source_start : source_start + size]
    )
    np.testing.assert_array_equal(target, expected)


def test_a_source_may_be_read_only():
    target = np.zeros(100, np.uint8)
    copy_past_cache(target, np.frombuffer(bytes(range(100)), np.uint8))
    np.testing.assert_array_equal(target, np.arange(100))


def test_lengths_must_agree():
    with pytest.raises(AssertionError):
        copy_past_cache(np.zeros(3, np.uint8), np.zeros(4, np.uint8))
