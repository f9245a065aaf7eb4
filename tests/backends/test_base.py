"""Rows are arrays by address."""

import gc
import weakref

import numpy as np
import pytest

from shardopt.backends.base import Rows
from shardopt.layout.span import Span


def addresses(*arrays):
    return [array.ctypes.data for array in arrays]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rows_have_the_addresses_of_arrays(dtype):
    matrix, apart = np.zeros((3, 50), dtype), np.zeros(50, dtype)
    rows = Rows.of(*matrix, apart)
    assert (len(rows), rows.numel, rows.dtype) == (4, 50, np.dtype(dtype))
    assert rows.addresses.dtype == np.int64
    assert rows.addresses.tolist() == addresses(*matrix, apart)


def test_some_of_the_rows():
    matrix = np.zeros((5, 50), np.float32)
    some = Rows.of(*matrix)[1:3]
    assert (len(some), some.numel) == (2, 50)
    assert some.addresses.tolist() == addresses(*matrix[1:3])
    assert len(some[2:]) == 0


def test_a_part_of_the_rows():
    matrix = np.zeros((2, 50), np.float64)
    part = Rows.of(*matrix).part(Span(10, 30)).part(Span(5, 20))
    assert (len(part), part.numel, part.dtype) == (2, 15, np.dtype(np.float64))
    assert part.addresses.tolist() == addresses(*matrix[:, 15:30])
    assert Rows.of(*matrix).part(Span(50, 50)).numel == 0


@pytest.mark.parametrize("span", [Span(0, 51), Span(-1, 3), Span(4, 3)])
def test_a_part_lies_within_the_rows(span):
    with pytest.raises(AssertionError):
        Rows.of(np.zeros(50)).part(span)


@pytest.mark.parametrize(
    "others",
    [
        [np.zeros(51, np.float32)],
        [np.zeros(50, np.float64)],
        [np.zeros((1, 50), np.float32)],
        [np.zeros(100, np.float32)[::2]],
    ],
)
def test_rows_are_alike_and_contiguous(others):
    with pytest.raises(AssertionError):
        Rows.of(np.zeros(50, np.float32), *others)


def test_rows_keep_their_memory_alive():
    array = np.zeros(50)
    memory = weakref.ref(array)
    part = Rows.of(array)[:1].part(Span(3, 9))
    del array
    gc.collect()
    assert memory() is not None
    del part
    gc.collect()
    assert memory() is None
