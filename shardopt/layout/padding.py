"""Where in memory an array begins, so that arrays walked side by side do not collide.

[Note: staggered streams]
A kernel walks several arrays at one index. Where their addresses differ by a power of two, as
those of a model's arrays easily do, they meet in the same cache sets, way-predictor tags and
memory banks: on one processor the kernel then took 2.4 instead of 0.9 ns a parameter. Each array is
therefore a *stream* with an offset of its own: it begins ``stream * STEP_NBYTES`` past a
multiple of ``PERIOD_NBYTES``, counted from stream 0. The step of five pages has two bits set,
which no single bit of a distance can cancel, and gives all of the first 64 streams different
offsets.
"""

import numpy as np

STEP_NBYTES = 5 * 4096
PERIOD_NBYTES = 64 * 4096


def row_numel(numel: int, dtype: str) -> int:
    """Elements from row to row of a matrix whose rows of ``numel`` are streams 0, 1, 2 ..."""
    itemsize = np.dtype(dtype).itemsize
    return (-(-numel * itemsize // PERIOD_NBYTES) * PERIOD_NBYTES + STEP_NBYTES) // itemsize
