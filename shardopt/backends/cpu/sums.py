"""Numba loops that sum the rows of several ranks, and measure the sum."""

from typing import Any

import numpy as np

from shardopt._typing import FloatArray
from shardopt.backends.cpu import elements
from shardopt.backends.cpu.elements import (
    address_of,
    array_at,
    chosen_by_type,
    inner,
    row,
    store,
    widen,
    widen_to,
)
from shardopt.compiling import compiled

NUM_ACCUMULATORS = 64
_jit = inner(elements)


@_jit
def _add_two(rows: Any, first: int, start: int, stop: int, scale: Any, out: FloatArray) -> None:
    a, b = row(rows, first, start, stop), row(rows, first + 1, start, stop)
    for i in range(out.size):
        out[i] = (widen_to(a[i], out[i]) + widen_to(b[i], out[i])) * scale


@_jit
def _add_four(rows: Any, first: int, start: int, stop: int, scale: Any, out: FloatArray) -> None:
    """Add four rows in one loop: a loop for each sum of two took 1.1 times as long."""
    a, b = row(rows, first, start, stop), row(rows, first + 1, start, stop)
    c, d = row(rows, first + 2, start, stop), row(rows, first + 3, start, stop)
    for i in range(out.size):
        left = widen_to(a[i], out[i]) + widen_to(b[i], out[i])
        out[i] = (left + (widen_to(c[i], out[i]) + widen_to(d[i], out[i]))) * scale


@_jit
def _accumulate(total: FloatArray, more: FloatArray) -> None:
    for i in range(total.size):  # with total a third time, as out, it would not vectorise
        total[i] += widen(more[i])


@_jit
def _join(top: int, nbytes: int, partials: FloatArray, numel: int) -> int:
    """Add the uppermost sum of a stack to the one below; return where the stack ends now."""
    below = array_at(top - 2 * nbytes, partials, numel)
    _accumulate(below, array_at(top - nbytes, partials, numel))
    return top - nbytes


@_jit
def _scale(values: FloatArray, scale: Any) -> None:
    for i in range(values.size):  # with an array for the result, even the same, it is not fast
        values[i] *= scale


@chosen_by_type
def _scaled(source: Any, scale: Any, scratch: Any) -> Any:
    """Return the only source, scaled, in the dtype of the sum: in ``scratch`` or as it is."""

    def computed(source: Any, scale: Any, scratch: Any) -> Any:
        for i in range(scratch.size):
            scratch[i] = widen_to(source[i], scratch[i]) * scale
        return scratch

    def itself(source: Any, scale: Any, scratch: Any) -> Any:
        if scale == 1:
            return source
        for i in range(scratch.size):
            scratch[i] = source[i] * scale
        return scratch

    return itself if source == scratch else computed


@_jit
def sum_rows(rows: Any, start: int, stop: int, partials: FloatArray, factor: float) -> FloatArray:
    """Sum elements [start, stop) of the rows, times a factor, by [Note: the bits of a sum].

    ``partials`` is a stack of the sums of complete subtrees, each half as large as the one below:
    after four rows, as many are joined as the number of the four has trailing one bits. The result
    is in ``partials``, or the row itself if it is the only one and has the dtype.

    One, two or four rows take a single loop, which multiplies by the factor as well. One of 1
    changes no bit.
    """
    num_rows, numel, base = rows[0].size, stop - start, address_of(partials)
    one, scale, nbytes = partials.dtype.type(1), partials.dtype.type(factor), partials[0].nbytes
    total: FloatArray = array_at(base, partials, numel)
    if num_rows == 1:
        only: FloatArray = _scaled(row(rows, 0, start, stop), scale, total)
        return only
    at_once = scale if num_rows == 2 or num_rows == 4 else one
    top = base  # of the stack
    for number in range(0, num_rows - 3, 4):
        _add_four(rows, number, start, stop, at_once, array_at(top, partials, numel))
        top += nbytes
        bits = number >> 2
        while bits & 1:
            top = _join(top, nbytes, partials, numel)
            bits >>= 1
    if num_rows & 2:
        _add_two(rows, num_rows & -4, start, stop, at_once, array_at(top, partials, numel))
        top += nbytes
    if num_rows & 1:
        last = row(rows, num_rows - 1, start, stop)
        _accumulate(array_at(top - nbytes, partials, numel), last)
    while top > base + nbytes:
        top = _join(top, nbytes, partials, numel)
    if at_once != scale:
        _scale(total, scale)
    return total


@_jit
def _square_sum(values: FloatArray, accumulators: FloatArray) -> float:
    """Sum squares in float64, every 64th in one accumulator: a fixed order that vectorises."""
    for i in range(NUM_ACCUMULATORS):
        accumulators[i] = 0.0
    for base in range(0, values.size, NUM_ACCUMULATORS):
        run = values[base : base + NUM_ACCUMULATORS]
        for i in range(NUM_ACCUMULATORS):
            value = np.float64(run[i])
            accumulators[i] += value * value
    total = 0.0
    for i in range(NUM_ACCUMULATORS):
        total += accumulators[i]
    return total


@compiled(error_model="numpy", calls=(elements,))
def reduce(rows: Any, out: Any, scratch: Any, span: Any, square_sums: Any) -> None:
    """Reduce the chunks of a span; see ``Kernel.reduce``.

    Args:
        rows: Gradients; see [Note: rows by address].
        out: For the sums, from the start of the span on; empty if they are not wanted.
        scratch: Memory for ``sum_rows``, whose rows are as long as a chunk, and for accumulators.
        span: Start, stop and the factor.
        square_sums: Likewise for the squares of each chunk.
    """
    (start, stop, factor), (partials, accumulators) = span, scratch
    numel = partials.shape[1]
    for begin in range(start, stop, numel):
        total = sum_rows(rows, begin, begin + numel, partials, factor)
        if out.size:
            store(total, array_at(address_of(out) + (begin - start) * out.itemsize, out, numel))
        if square_sums.size:
            square_sums[(begin - start) // numel] = _square_sum(total, accumulators)
