"""Where in memory an array begins, so that arrays walked side by side do not collide.

[Note: padding between arrays]
A kernel walks several arrays at one index. If their addresses differ by a power of two, as those
of a model's arrays easily do, they compete for the same cache sets, way-predictor tags and memory
banks: on one processor the kernel then took 2.4 instead of 0.9 ns a parameter. The arrays of a
region are therefore numbered, and array ``i`` begins ``i * STEP_NBYTES`` past a multiple of
``PERIOD_NBYTES``, counted from array 0. The step of five pages has two bits set, which no single
bit of a distance can cancel, and gives the first 64 arrays different offsets.
"""

import numpy as np

STEP_NBYTES = 5 * 4096
PERIOD_NBYTES = 64 * 4096


def row_numel(numel: int, dtype: str) -> int:
    """Return the distance between the rows, ``numel`` elements each, of a matrix of arrays 0, 1 ...

    In elements of ``dtype``, at least ``numel``.
    """
    itemsize = np.dtype(dtype).itemsize
    return (-(-numel * itemsize // PERIOD_NBYTES) * PERIOD_NBYTES + STEP_NBYTES) // itemsize
