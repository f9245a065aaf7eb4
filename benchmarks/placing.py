"""Arrays that begin where the optimizer's do.

The optimizer's windows begin on a page. NumPy's own large arrays begin 16 bytes behind one, so
that every second load and store of a loop touches two cache lines.
"""

import mmap

import numpy as np

from shardopt._typing import FloatArray


def page_aligned(numel: int, dtype: str) -> FloatArray:
    """Allocate [numel] elements, beginning on a page; not touched yet."""
    nbytes = numel * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + mmap.PAGESIZE, np.uint8)
    skip = -memory.ctypes.data % mmap.PAGESIZE
    return memory[skip : skip + nbytes].view(dtype)
