"""What memory gives to the same cores here and now, measured with the means of the kernels.

[Note: two bandwidths]
STREAM's triad, ``a = b + 3 c``, counts the 3 elements that the loop names, as in J. D. McCalpin,
"Memory bandwidth and machine balance in current high performance computers", 1995. But a
processor reads a line before it writes to it: 4 elements pass, and a loop that only writes to what
it has read can come out at 4/3 of the triad. ``a = a + 3 c`` is such a loop; its 3 elements are all
that pass. Claims are made against the triad, which everybody knows; the limit in the plot is
the other.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from placing import page_aligned
from shardopt._typing import FloatArray
from shardopt.backends.cpu.memory import padded_zeros

_SCALE = 3.0


def _triad(a: FloatArray, b: FloatArray, c: FloatArray, scale: Any) -> None:
    for i in range(a.size):
        a[i] = b[i] + scale * c[i]


def _axpy(a: FloatArray, c: FloatArray, scale: Any) -> None:
    for i in range(a.size):
        a[i] = a[i] + scale * c[i]


_compiled_triad: Callable[..., None] = numba.njit(nogil=True)(_triad)
_compiled_axpy: Callable[..., None] = numba.njit(nogil=True)(_axpy)


class Triad:
    """Triad and axpy over arrays that are placed as the optimizer places its own.

    Args:
        numel: Elements of each array.
        dtype: Of the arrays.
        threads: Threads to run on, each on a run of its own, which it touches first.

    Attributes:
        nbytes: What one run counts as, of either.
    """

    def __init__(self, numel: int, dtype: str, threads: int) -> None:
        self.nbytes = 3 * numel * np.dtype(dtype).itemsize
        self._scale = np.dtype(dtype).type(_SCALE)
        origin = page_aligned(1, dtype)
        self._arrays = [padded_zeros(numel, dtype, stream, origin) for stream in range(3)]
        self._cuts = [numel * i // threads for i in range(threads + 1)]
        self._pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self._for_each(self._touch)
        self.triad()
        self.axpy()

    def triad(self) -> None:
        """Compute ``a = b + 3 c``."""
        self._for_each(self._triad)

    def axpy(self) -> None:
        """Compute ``a = a + 3 c``."""
        self._for_each(self._axpy)

    def close(self) -> None:
        """End the threads and free the arrays."""
        self._arrays.clear()
        if self._pool is not None:
            self._pool.shutdown()

    def _triad(self, start: int, stop: int) -> None:
        a, b, c = self._arrays
        _compiled_triad(a[start:stop], b[start:stop], c[start:stop], self._scale)

    def _axpy(self, start: int, stop: int) -> None:
        a, _, c = self._arrays
        _compiled_axpy(a[start:stop], c[start:stop], self._scale)

    def _touch(self, start: int, stop: int) -> None:
        for number, array in enumerate(self._arrays):
            array[start:stop] = 1 + number

    def _for_each(self, function: Callable[[int, int], None]) -> None:
        runs = [(self._cuts[i], self._cuts[i + 1]) for i in range(len(self._cuts) - 1)]
        if self._pool is None:
            function(*runs[0])
            return
        others = [self._pool.submit(function, *run) for run in runs[1:]]
        function(*runs[0])
        for other in others:
            other.result()
