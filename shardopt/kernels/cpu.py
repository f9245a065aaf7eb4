"""The fused step on CPUs: Numba loops at the speed of memory, without fast-math.

[Note: loops the compiler can vectorise]
Every loop indexes slices by one ``i`` from 0 (two offsets in one loop cost a factor of six) and
works on a chunk at a time: the summed gradients stay in the first-level cache, so that a sum
over sources costs no more than reading them.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from shardopt.errors import KernelError
from shardopt.kernels.base import ALL_FINITE, FloatArray, UpdatePlan
from shardopt.nadam import NUM_COEFFICIENTS
from shardopt.partition import CHUNK_NUMEL

DTYPES = ("float32", "float64")
MIN_PIECE_NUMEL = 64 * CHUNK_NUMEL
"""Threads get no smaller pieces of a shard than this: handing one over costs some 20 us."""

_NUM_ACCUMULATORS = 64
_MAX_TREE_DEPTH = 32


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use; keep the code on disk where some cache folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # a read-only installation and no home folder
        return numba.njit(nogil=True, error_model="numpy")(function)


@_jit
def _add(left: FloatArray, right: FloatArray, out: FloatArray) -> None:
    for i in range(out.size):
        out[i] = left[i] + right[i]


@_jit
def _accumulate(total: FloatArray, more: FloatArray) -> None:
    for i in range(total.size):  # with total a third time, as out, it would not vectorise
        total[i] += more[i]


@_jit
def _copy(source: FloatArray, out: FloatArray) -> None:
    for i in range(out.size):  # an assignment of slices would look for overlaps first
        out[i] = source[i]


@_jit
def _sum_sources(grads: FloatArray, start: int, stop: int, partials: FloatArray) -> FloatArray:
    """Sum grads[:, start:stop] as [Note: the bits of a sum] says; may return a view of it.

    ``partials`` is a stack of the sums of complete subtrees, each half as large as the one below:
    as many are joined after a pair of rows as its number has trailing one bits.
    """
    num_sources = grads.shape[0]
    if num_sources == 1:
        return grads[0, start:stop]
    numel = stop - start
    depth = 0
    for row in range(0, num_sources - 1, 2):
        _add(grads[row, start:stop], grads[row + 1, start:stop], partials[depth, :numel])
        depth += 1
        bits = row >> 1
        while bits & 1:
            depth -= 1
            _accumulate(partials[depth - 1, :numel], partials[depth, :numel])
            bits >>= 1
    if num_sources & 1:
        _accumulate(partials[depth - 1, :numel], grads[num_sources - 1, start:stop])
    while depth > 1:
        depth -= 1
        _accumulate(partials[depth - 1, :numel], partials[depth, :numel])
    return partials[0, :numel]


@_jit
def _update_block(
    grad: FloatArray,
    param: FloatArray,
    exp_avg: FloatArray,
    exp_avg_sq: FloatArray,
    coefficients: FloatArray,
) -> int:
    """Apply [Note: one formula, four schedules]; returns how many parameters are not finite."""
    source_scale, weight_decay, param_scale = coefficients[0], coefficients[1], coefficients[2]
    m_decay, m_gain = coefficients[3], coefficients[4]
    beta2, v_gain = coefficients[5], coefficients[6]
    g_scale, m_scale = coefficients[7], coefficients[8]
    v_scale, eps = coefficients[9], coefficients[10]
    num_poisoned = 0
    for i in range(param.size):
        p = param[i]
        g = source_scale * grad[i] + weight_decay * p
        m = m_decay * exp_avg[i] + m_gain * g
        v = beta2 * exp_avg_sq[i] + (v_gain * g) * g
        p = param_scale * p - (g_scale * g + m_scale * m) / (np.sqrt(v * v_scale) + eps)
        exp_avg[i] = m
        exp_avg_sq[i] = v
        param[i] = p
    for i in range(param.size):
        num_poisoned += not np.isfinite(param[i])
    return num_poisoned


@_jit
def _update(
    grads: FloatArray,
    param: FloatArray,
    exp_avg: FloatArray,
    exp_avg_sq: FloatArray,
    local_zero: int,
    start: int,
    stop: int,
    segments: Any,
    coefficients: FloatArray,
) -> int:
    """Update the segments' parts within [start, stop); see ``Kernel.update``."""
    partials = np.empty((_MAX_TREE_DEPTH if grads.shape[0] > 1 else 0, CHUNK_NUMEL), param.dtype)
    poisoned = ALL_FINITE
    for segment in range(segments.shape[0]):
        begin, end = max(segments[segment, 0], start), min(segments[segment, 1], stop)
        scalars = coefficients[segments[segment, 2]]
        while begin < end:
            block_end = min(end, (begin // CHUNK_NUMEL + 1) * CHUNK_NUMEL)
            num_poisoned = _update_block(
                _sum_sources(grads, begin, block_end, partials),
                param[begin:block_end],
                exp_avg[begin - local_zero : block_end - local_zero],
                exp_avg_sq[begin - local_zero : block_end - local_zero],
                scalars,
            )
            if num_poisoned > 0 and poisoned == ALL_FINITE:
                poisoned = begin
            begin = block_end
    return poisoned


@_jit
def _square_sum(values: FloatArray, accumulators: FloatArray) -> float:
    """Sum squares in float64: every 64th into one accumulator, a fixed order that vectorises."""
    accumulators[:] = 0.0
    for base in range(0, values.size, _NUM_ACCUMULATORS):
        run = values[base : base + _NUM_ACCUMULATORS]
        for i in range(_NUM_ACCUMULATORS):
            value = np.float64(run[i])
            accumulators[i] += value * value
    total = 0.0
    for i in range(_NUM_ACCUMULATORS):
        total += accumulators[i]
    return total


@_jit
def _reduce(
    grads: FloatArray,
    out: FloatArray,
    first: int,
    start: int,
    stop: int,
    square_sums: FloatArray,
) -> None:
    """Reduce the chunks of [start, stop); see ``Kernel.reduce``. ``first`` is the shard's start."""
    partials = np.empty((_MAX_TREE_DEPTH if grads.shape[0] > 1 else 0, CHUNK_NUMEL), out.dtype)
    accumulators = np.empty(_NUM_ACCUMULATORS, np.float64)
    for begin in range(start, stop, CHUNK_NUMEL):
        total = _sum_sources(grads, begin, begin + CHUNK_NUMEL, partials)
        if grads.shape[0] > 1:
            _copy(total, out[begin : begin + CHUNK_NUMEL])
        square_sums[(begin - first) // CHUNK_NUMEL] = _square_sum(total, accumulators)


class CpuKernel:
    """Updates shards on this rank's cores.

    Args:
        threads: Cores to use. A shard is cut into pieces that plain Python threads update: kernels
            hold no GIL, and Numba's own threading layers, which ranks would fight over, stay out.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "shardopt") if threads > 1 else None

    def prepare(self, dtype: str) -> None:
        """Compile the kernels for ``dtype``, so that the first step is as fast as the others.

        Raises:
            KernelError: There is no kernel for ``dtype``.
        """
        if dtype not in DTYPES:
            raise KernelError(
                f"parameter dtype must be one of {', '.join(DTYPES)}; got {dtype}. "
                "Convert the parameters."
            )
        grads = np.zeros((1, CHUNK_NUMEL), dtype)
        param, exp_avg, exp_avg_sq = np.zeros((3, CHUNK_NUMEL), dtype)
        segments = np.zeros((0, 3), np.int64)
        plan = UpdatePlan(0, CHUNK_NUMEL, segments, np.zeros((1, NUM_COEFFICIENTS), dtype))
        self.update(grads, param, exp_avg, exp_avg_sq, plan)
        self.reduce(grads, param, 0, CHUNK_NUMEL, np.zeros(1))

    def update(
        self,
        grads: FloatArray,
        param: FloatArray,
        exp_avg: FloatArray,
        exp_avg_sq: FloatArray,
        plan: UpdatePlan,
    ) -> int:
        """See ``Kernel.update``."""

        def piece(start: int, stop: int) -> int:
            return int(
                _update(
                    grads, param, exp_avg, exp_avg_sq, plan.start, start, stop,
                    plan.segments, plan.coefficients,
                )
            )  # fmt: skip

        flags = [flag for flag in self._run(piece, plan.start, plan.stop) if flag != ALL_FINITE]
        return min(flags, default=ALL_FINITE)

    def reduce(
        self, grads: FloatArray, out: FloatArray, start: int, stop: int, square_sums: FloatArray
    ) -> None:
        """See ``Kernel.reduce``."""
        self._run(lambda low, high: _reduce(grads, out, start, low, high, square_sums), start, stop)

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
