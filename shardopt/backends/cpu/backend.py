"""The CPU backend: NumPy arrays, the node's shared memory, and a kernel that runs on threads."""

import numpy as np

from shardopt._typing import Array, FloatArray
from shardopt.backends.cpu.kernel import CpuKernel


class CpuBackend:
    """Computes on this rank's cores; all work is done when a call returns.

    Args:
        threads: Cores to use.

    Attributes:
        kernel: The kernel that updates arrays of this backend.
    """

    def __init__(self, threads: int) -> None:
        self.kernel = CpuKernel(threads)

    def host_zeros(self, numel: int, dtype: str) -> Array:
        """See ``Backend.host_zeros``."""
        return np.zeros(numel, dtype)

    def copy(self, target: Array, source: Array) -> None:
        """See ``Backend.copy``."""
        assert target.shape == source.shape
        np.copyto(target, source, casting="equiv")  # bytes may be swapped

    def duplicate(self, array: Array) -> Array:
        """See ``Backend.duplicate``."""
        return array.copy()

    def zero(self, array: Array) -> None:
        """See ``Backend.zero``."""
        if array.flags.c_contiguous:  # some dtypes are filled slowly
            array = array.reshape(-1).view(np.uint8)
        array[...] = 0

    def scale(self, array: FloatArray, factor: float) -> None:
        """See ``Backend.scale``."""
        array *= array.dtype.type(factor)

    def event(self) -> "_Done":
        """See ``Backend.event``."""
        return _Done()

    def wait(self) -> None:
        """Return: all work is done."""

    def host(self, array: FloatArray) -> FloatArray:
        """Return the array itself, which the host can read."""
        return array

    def close(self) -> None:
        """End the kernel's threads."""
        self.kernel.close()


class _Done:
    """An event of a processor that has finished before it returns."""

    def is_done(self) -> bool:
        """See ``Event.is_done``."""
        return True

    def wait(self) -> None:
        """See ``Event.wait``."""
