"""Streams begin at different offsets, wherever the allocator puts them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardopt.backends.cpu.memory import padded_zeros
from shardopt.layout.padding import PERIOD_NBYTES, STEP_NBYTES, row_numel


def test_offsets_of_64_streams_differ():
    assert len({stream * STEP_NBYTES % PERIOD_NBYTES for stream in range(64)}) == 64


@given(st.integers(1, 1 << 20), st.integers(0, 9), st.sampled_from(["float32", "float64"]))
def test_staggered_zeros(numel, stream, dtype):
    origin = np.zeros(10, dtype)
    array = padded_zeros(numel, dtype, stream, origin)
    assert (array.shape, array.dtype) == ((numel,), dtype)
    assert not array[:100].any()
    distance = array.ctypes.data - origin.ctypes.data
    assert (distance - stream * STEP_NBYTES) % PERIOD_NBYTES == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(numel=st.integers(0, 1 << 40))
def test_rows_hold_their_elements_and_are_consecutive_streams(dtype, numel):
    row, itemsize = row_numel(numel, dtype), np.dtype(dtype).itemsize
    assert row >= numel
    assert (row * itemsize - STEP_NBYTES) % PERIOD_NBYTES == 0
    assert (row - numel) * itemsize <= PERIOD_NBYTES + STEP_NBYTES
