"""Memory bandwidth of the cores that run this process.

[Note: two bandwidths]
STREAM's triad, ``a = b + 3 c``, counts the three elements that the loop names, as in
J. D. McCalpin, "Memory bandwidth and machine balance in current high performance computers", 1995.
But a processor reads a cache line before it writes to it, so four elements move, and a loop that
writes only to what it has read can reach 4/3 of the triad. ``a = a + 3 c`` (axpy) is such a loop:
its three elements are all that moves. Claims are made against the triad, which everybody knows; the
limit in the plots is axpy.
"""

import mmap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import cycle
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from shardopt._typing import FloatArray
from shardopt.layout.padding import row_numel
from shardopt.layout.span import Span

_SCALE = 3.0
_BLOCK_NUMEL = 256 << 10  # between two looks at the clock

_T = TypeVar("_T")


class ThreadedArrays:
    """Arrays that several threads walk side by side, each thread its own part of all of them.

    They begin where the optimizer's arrays do: the first on a page, the others as
    [Note: padding between arrays] says. Array ``i`` is filled with ``1 + i``, each part by the
    thread that will use it.

    Args:
        num_arrays: Number of arrays.
        numel: Elements of each array; at least one per thread.
        dtype: NumPy's name of their dtype.
        num_threads: Number of threads, the calling one included.

    Attributes:
        array_nbytes: Size of one array in bytes.
    """

    def __init__(self, num_arrays: int, numel: int, dtype: str, num_threads: int) -> None:
        self.array_nbytes = numel * np.dtype(dtype).itemsize
        pitch = row_numel(numel, dtype)
        rows = _page_aligned(num_arrays * pitch, dtype).reshape(num_arrays, pitch)
        spans = [Span(0, numel).cut(thread, num_threads) for thread in range(num_threads)]
        self._parts = [[row[span.slice] for row in rows] for span in spans]
        self._pool = ThreadPoolExecutor(num_threads - 1) if num_threads > 1 else None
        self.map(_fill)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def map(self, function: Callable[..., _T]) -> list[_T]:
        """Call ``function`` on all threads at once, and return what each call returned.

        Args:
            function: Called with one thread's part of each array.
        """
        first, *others = self._parts
        if self._pool is None:
            return [function(*first)]
        pending = [self._pool.submit(function, *parts) for parts in others]
        return [function(*first), *(future.result() for future in pending)]

    def close(self) -> None:
        """End the threads and free the arrays."""
        self._parts.clear()
        if self._pool is not None:
            self._pool.shutdown()


def measure_addition(arrays: ThreadedArrays, budget_s: float) -> float:
    """Measure ``a += b``, which moves as many bytes as it names, without compiling anything.

    Args:
        arrays: Two arrays, larger together than the caches.
        budget_s: Seconds to keep adding.

    Returns:
        Bytes/s of all threads together: two reads and one write per element.
    """
    return sum(arrays.map(lambda a, b: _measure_addition_of(a, b, budget_s)))


def _measure_addition_of(a: FloatArray, b: FloatArray, budget_s: float) -> float:
    spans = Span(0, a.size).chunks(_BLOCK_NUMEL)
    blocks = cycle([(a[span.slice], b[span.slice]) for span in spans])
    nbytes, elapsed_s, start_s = 0, 0.0, time.perf_counter()
    while elapsed_s < budget_s:
        x, y = next(blocks)
        np.add(x, y, out=x)
        nbytes += 3 * x.nbytes
        elapsed_s = time.perf_counter() - start_s
    return nbytes / elapsed_s


class Triad:
    """The loops of STREAM, compiled as the kernels are, over arrays placed as the optimizer's.

    Construction compiles the loops and runs each of them once.

    Args:
        numel: Elements of each of the three arrays; at least one per thread.
        dtype: NumPy's name of their dtype.
        num_threads: Number of threads to run on.

    Attributes:
        nbytes: Bytes that one run of ``triad`` or ``axpy`` counts: three elements each.
        copy_nbytes: Bytes that one run of ``copy`` counts: two elements each.
    """

    def __init__(self, numel: int, dtype: str, num_threads: int) -> None:
        self._arrays = ThreadedArrays(3, numel, dtype, num_threads)
        self._scale = np.dtype(dtype).type(_SCALE)
        self.nbytes = 3 * self._arrays.array_nbytes
        self.copy_nbytes = 2 * self._arrays.array_nbytes
        for run in (self.triad, self.axpy, self.copy):
            run()

    def triad(self) -> None:
        """Compute ``a = b + 3 c``."""
        loop = _compiled(_triad)
        self._arrays.map(lambda a, b, c: loop(a, b, c, self._scale))

    def axpy(self) -> None:
        """Compute ``a = a + 3 c``."""
        loop = _compiled(_axpy)
        self._arrays.map(lambda a, _, c: loop(a, c, self._scale))

    def copy(self) -> None:
        """Copy ``b`` to ``a``, as ``memcpy`` does."""
        self._arrays.map(lambda a, b, _: np.copyto(a, b))

    def close(self) -> None:
        """End the threads and free the arrays."""
        self._arrays.close()


def _page_aligned(numel: int, dtype: str) -> FloatArray:
    """Allocate [numel] elements that begin on a page, without touching them."""
    nbytes = numel * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + mmap.PAGESIZE, np.uint8)
    skip = -memory.ctypes.data % mmap.PAGESIZE
    return memory[skip : skip + nbytes].view(dtype)


def _fill(*parts: FloatArray) -> None:
    for number, part in enumerate(parts):
        part[:] = 1 + number


def _triad(a: FloatArray, b: FloatArray, c: FloatArray, scale: Any) -> None:
    for i in range(a.size):
        a[i] = b[i] + scale * c[i]


def _axpy(a: FloatArray, c: FloatArray, scale: Any) -> None:
    for i in range(a.size):
        a[i] = a[i] + scale * c[i]


@cache
def _compiled(loop: Callable[..., None]) -> Callable[..., None]:
    import numba  # here: measure_addition does without it

    compiled: Callable[..., None] = numba.njit(nogil=True)(loop)
    return compiled
