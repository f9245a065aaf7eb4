"""Where in memory an array begins, so that arrays walked side by side do not collide.

[Note: padding between arrays]
A kernel walks several arrays at one index. If their addresses differ by a power of two, as those
of a model's arrays easily do, they compete for the same cache sets, way-predictor tags and memory
banks: on one processor the kernel then took 2.4 instead of 0.9 ns a parameter. The arrays of a
region are therefore numbered, and array ``i`` begins ``i * STEP_NBYTES`` past a multiple of
``PERIOD_NBYTES``, counted from array 0. The step of five pages has two bits set, which no single
bit of a distance can cancel, and gives the first 64 arrays different offsets.
"""

from collections.abc import Iterable

import numpy as np

PAGE_NBYTES = 4096
STEP_NBYTES = 5 * PAGE_NBYTES
PERIOD_NBYTES = 64 * PAGE_NBYTES


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple that is not less than ``value``."""
    return -(-value // multiple) * multiple


def place_arrays(arrays: Iterable[tuple[int, int]]) -> tuple[list[int], int]:
    """Place arrays one behind the other in memory that starts at array 0's offset.

    Args:
        arrays: The number and the bytes of each; short arrays begin on the next page.

    Returns:
        Where each begins, in bytes, and where the last one ends, on a page.
    """
    starts, stop = [], 0
    for number, nbytes in arrays:
        start = round_up(stop, PAGE_NBYTES)
        if nbytes >= PERIOD_NBYTES:
            start += (number * STEP_NBYTES - start) % PERIOD_NBYTES
        starts.append(start)
        stop = start + nbytes
    return starts, round_up(stop, PAGE_NBYTES)


def row_numel(numel: int, dtype: str) -> int:
    """Return the distance between the rows, ``numel`` elements each, of a matrix of arrays 0, 1 ...

    In elements of ``dtype``, at least ``numel``.
    """
    itemsize = np.dtype(dtype).itemsize
    return (-(-numel * itemsize // PERIOD_NBYTES) * PERIOD_NBYTES + STEP_NBYTES) // itemsize
