"""The fused step on CPUs: threads that run the loops of ``shardopt.backends.cpu.loops``."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from shardopt._typing import FloatArray
from shardopt.backends.base import ALL_FINITE, UpdatePlan
from shardopt.backends.cpu import loops
from shardopt.errors import KernelError
from shardopt.layout.dtypes import DTYPES, compute_dtype, has_master
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.rule.nadam import NUM_COEFFICIENTS

MIN_PIECE_NUMEL = 64 * CHUNK_NUMEL
"""Threads get no smaller pieces of a shard than this: handing one over costs some 20 us."""


class CpuKernel:
    """Updates shards on this rank's cores.

    Args:
        threads: Cores to use. A shard is cut into pieces that plain Python threads update: kernels
            hold no GIL, and Numba's own threading layers, which ranks would fight over, stay out.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.piece_numel = 2 * threads * MIN_PIECE_NUMEL  # well under a millisecond
        self._pool = ThreadPoolExecutor(threads - 1, "shardopt") if threads > 1 else None

    def prepare(self, dtype: str, wire_dtype: str | None = None) -> None:
        """See ``Kernel.prepare``; compiles."""
        if dtype not in DTYPES:
            raise KernelError(
                f"parameter dtype must be one of {', '.join(DTYPES)}; got {dtype}. "
                "Convert the parameters."
            )
        grads, param = np.zeros((1, CHUNK_NUMEL), dtype), np.zeros(CHUNK_NUMEL, dtype)
        master, exp_avg, exp_avg_sq = np.zeros((3, CHUNK_NUMEL), compute_dtype(dtype))
        coefficients = np.zeros((1, NUM_COEFFICIENTS), compute_dtype(dtype))
        plan = UpdatePlan(0, CHUNK_NUMEL, np.zeros((0, 3), np.int64), coefficients)
        in_full = has_master(dtype)
        squares = np.zeros(1)
        if wire_dtype is None:
            self.reduce(grads, None if in_full else param, 0, CHUNK_NUMEL, squares)
        else:
            wire = np.zeros((1, CHUNK_NUMEL), wire_dtype)
            self.reduce(grads, wire[0], 0, CHUNK_NUMEL, None)
            grads = np.zeros((1, CHUNK_NUMEL), compute_dtype(dtype))
            self.reduce(wire, grads[0], 0, CHUNK_NUMEL, squares)
        self.update(grads, param, master if in_full else None, exp_avg, exp_avg_sq, plan)

    def update(
        self,
        grads: FloatArray,
        param: FloatArray,
        master: FloatArray | None,
        exp_avg: FloatArray,
        exp_avg_sq: FloatArray,
        plan: UpdatePlan,
    ) -> int:
        """See ``Kernel.update``."""
        sources, out = _stand_in(grads), _stand_in(param)

        def piece(start: int, stop: int) -> int:
            return int(
                loops.update(
                    sources, out, master, exp_avg, exp_avg_sq, _partial_sums(grads, param),
                    plan.sources_start, plan.start, start, stop, plan.segments, plan.coefficients,
                )
            )  # fmt: skip

        flags = [flag for flag in self._run(piece, plan.start, plan.stop) if flag >= 0]
        return min(flags, default=ALL_FINITE)

    def reduce(
        self,
        grads: FloatArray,
        out: FloatArray | None,
        start: int,
        stop: int,
        square_sums: FloatArray | None,
    ) -> None:
        """See ``Kernel.reduce``."""
        sources, sums = _stand_in(grads), None if out is None else _stand_in(out)

        def piece(low: int, high: int) -> None:
            partials = _partial_sums(grads, grads if out is None else out)
            loops.reduce(sources, sums, partials, start, low, high, square_sums)

        self._run(piece, start, stop)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _run(self, piece: Callable[[int, int], Any], start: int, stop: int) -> list[Any]:
        """Call ``piece`` on runs of whole chunks that cover [start, stop), one run a thread."""
        num_pieces = max(1, min(self.threads, (stop - start) // MIN_PIECE_NUMEL))
        if num_pieces == 1 or self._pool is None:
            return [piece(start, stop)]
        chunks = (stop - start) // CHUNK_NUMEL
        cuts = [start + chunks * i // num_pieces * CHUNK_NUMEL for i in range(num_pieces + 1)]
        others = [self._pool.submit(piece, *cuts[i : i + 2]) for i in range(1, num_pieces)]
        return [piece(*cuts[:2]), *(other.result() for other in others)]


def _stand_in(array: FloatArray) -> FloatArray:
    return array.view(loops.STAND_INS.get(array.dtype, array.dtype))


def _partial_sums(grads: FloatArray, out: FloatArray) -> FloatArray:
    """Allocate what ``loops`` keeps the sums of subtrees in; for one thread at a time."""
    dtype = np.promote_types(*(compute_dtype(array.dtype.name) for array in (grads, out)))
    return np.empty((len(grads).bit_length(), CHUNK_NUMEL), dtype)
