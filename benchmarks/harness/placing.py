"""Arrays that begin where the optimizer's do.

The optimizer's arrays begin on a page. NumPy's own large arrays begin 16 bytes behind one, so
that every second load and store of a loop touches two cache lines.
"""

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
Bytes = NDArray[np.uint8]

_FILL_NUMEL = 1 << 20


def page_aligned(numel: int, dtype: str) -> NDArray[Any]:
    """Allocate [numel] elements that begin on a page, untouched yet."""
    nbytes = numel * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + mmap.PAGESIZE, np.uint8)
    skip = -memory.ctypes.data % mmap.PAGESIZE
    return memory[skip : skip + nbytes].view(dtype)


def fill_random(array: FloatArray, size: float, seed: int) -> None:
    """Touch every page with numbers that are neither zero nor denormal.

    Args:
        array: [numel], of any dtype.
        size: Standard deviation of the numbers.
        seed: Tells different numbers apart.
    """
    rng = np.random.default_rng(seed)
    wide = np.dtype("float64" if array.dtype == np.float64 else "float32")
    for start in range(0, array.size, _FILL_NUMEL):
        run = array[start : start + _FILL_NUMEL]
        run[:] = rng.standard_normal(run.size, wide) * wide.type(size)
