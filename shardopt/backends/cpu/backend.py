"""The CPU backend: NumPy arrays, the node's shared memory, and a kernel that runs on threads."""

from typing import TYPE_CHECKING

import numpy as np

from shardopt._typing import FloatArray
from shardopt.backends.cpu.kernel import CpuKernel
from shardopt.backends.cpu.memory import padded_zeros

if TYPE_CHECKING:
    from shardopt.comm.node_memory.arena import Arena, NodeMemory


class CpuBackend:
    """Computes on this rank's cores; all work is done when a call returns.

    Args:
        threads: Cores to use.

    Attributes:
        kernel: The kernel that updates arrays of this backend.
    """

    def __init__(self, threads: int) -> None:
        self.kernel = CpuKernel(threads)

    def zeros(self, numel: int, dtype: str, index: int, origin: FloatArray) -> FloatArray:
        """See ``Backend.zeros``."""
        return padded_zeros(numel, dtype, index, origin)

    def share(self, arena: "Arena", nbytes: int, *, private: bool) -> "NodeMemory":
        """See ``Backend.share``."""
        return arena.allocate(nbytes, private=private)

    def copy(self, target: FloatArray, source: FloatArray) -> None:
        """See ``Backend.copy``."""
        assert target.shape == source.shape
        np.copyto(target, source, casting="no")

    def event(self) -> "_Done":
        """See ``Backend.event``."""
        return _Done()

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
