"""Private arrays of the CPU backend."""

import numpy as np

from shardopt._typing import FloatArray
from shardopt.layout.padding import PERIOD_NBYTES, STEP_NBYTES


def padded_zeros(numel: int, dtype: str, index: int, origin: FloatArray) -> FloatArray:
    """Allocate [numel] zeros where array ``index`` beside ``origin``, array 0, should begin.

    See [Note: padding between arrays].
    """
    nbytes = numel * np.dtype(dtype).itemsize
    memory = np.zeros(nbytes + PERIOD_NBYTES, np.uint8)  # what is skipped is never touched
    skip = (origin.ctypes.data + index * STEP_NBYTES - memory.ctypes.data) % PERIOD_NBYTES
    return memory[skip : skip + nbytes].view(dtype)
