"""What the CPU kernel runs: Numba loops at the speed of memory, without fast-math.

Everything compiled stands in this file, constants included: Numba keeps code on disk until the file
of the function called from Python changes, whatever became of what it took from elsewhere.

[Note: loops the compiler can vectorise]
Every loop indexes slices by one ``i`` from 0 (two offsets in one loop cost a factor of six) and
works on a block at a time: what it reads and writes stays in the first-level cache, so that a
sum over sources costs no more than reading them, and loop may follow upon loop.

[Note: integers that stand in for floats]
Numba has no 16-bit floats on CPUs. Arrays of integers stand in for them, uint16 for bfloat16 and
int16 for float16, and functions that are chosen by type while compiling let one set of loops do
for all dtypes. They return to 32 bits after every few operations: Numba computes with integers in
64 bits, which not every LLVM narrows again, and half of a vector's lanes would be lost.

The update compares parameters with their masters as it goes, but the masters are rounded in a loop
of their own: all in one, bfloat16 took 1.2 times as long, since fewer elements at once fit into
the window in which a processor reorders instructions.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

from shardopt._typing import FloatArray

STAND_INS = {
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16),
    np.dtype(np.float16): np.dtype(np.int16),
}
"""What arrays of 16-bit floats are viewed as; see [Note: integers that stand in for floats]."""

_BLOCK_NUMEL = 1024
_NUM_ACCUMULATORS = 64


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use; keep the code on disk where some cache folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # a read-only installation and no home folder
        return numba.njit(nogil=True, error_model="numpy")(function)


_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic


def _overload(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let what the decorated function returns be compiled for ``function``; it is given types."""
    decorator: Callable[..., Any] = overload(function, strict=False)  # lets annotations differ
    return decorator


def _widen_bfloat16(element: Any) -> Any:
    return np.uint32(element << 16).view(np.float32)


def _narrow_bfloat16(value: Any, like: Any) -> Any:
    bits = np.float32(value).view(np.uint32)
    rounded = np.uint32(bits + 0x7FFF + (bits >> 16 & 1))  # to the nearest; of a tie, to the even
    quiet = np.uint32(bits | 0x400000)  # a NaN, which rounding could carry over into a number
    return np.uint16(np.uint32(rounded if value == value else quiet) >> 16)


@_intrinsic
def _extend_half(_: Any, element: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@_intrinsic
def _truncate_to_half(_: Any, value: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


def _widen_float16(element: Any) -> Any:
    return _extend_half(element)


def _narrow_float16(value: Any, like: Any) -> Any:
    return _truncate_to_half(value)


def _widen_float16_by_bits(element: Any) -> Any:
    magnitude = np.uint32(element & 0x7FFF)
    moved = np.uint32(magnitude << 13)
    tiny = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    large = np.uint32(moved | 0x7F800000 if magnitude >= 0x7C00 else moved + (112 << 23))
    wide = np.uint32(tiny if magnitude < 0x0400 else large)
    return np.uint32(wide | (element & 0x8000) << 16).view(np.float32)


def _narrow_float16_by_bits(value: Any, like: Any) -> Any:
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(min(np.uint32(bits & 0x7FFFFFFF), np.uint32(0x47800000)))  # 2**16: inf
    normal = np.uint32(magnitude - (112 << 23) + 0xFFF + (magnitude >> 13 & 1))
    # The last place of 0.5 in float32 is that of float16's subnormals: to add it rounds to them.
    shifted = np.float32(magnitude.view(np.float32) + np.float32(0.5))
    tiny = np.uint32(shifted.view(np.uint32) - np.uint32(0x3F000000))
    rounded = np.uint32(tiny if magnitude < 113 << 23 else normal >> 13)
    number = np.uint32(rounded if value == value else 0x7E00)
    return np.int16(number | (bits >> 16 & 0x8000))


def _converts_float16() -> bool:
    """Whether the processor that is compiled for has instructions for it, as nearly all have.

    Without them LLVM would call a C library that need not be there; by bits, an update takes
    about twice as long.
    """
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return triple.startswith(("aarch64", "arm64")) or "+f16c" in features.split(",")


def _widen(element: Any) -> Any:
    """The element in the dtype that is computed in; exact."""


def _narrow(value: Any, like: Any) -> Any:
    """The value rounded to the nearest in the 16-bit dtype of ``like``; a NaN stays one."""


def _current(master: Any, param: Any) -> Any:
    """The master, or the parameter if somebody wrote to it; a parameter without one is its own."""


def _as_sum(source: Any, scratch: Any) -> Any:
    """The only source in the dtype that is computed in: itself, or converted into ``scratch``."""


def _store(values: Any, out: Any) -> Any:
    """Copy values of the dtype that is computed in, rounding them where ``out`` has another."""


def _is_finite(element: Any) -> Any:
    """Whether the element is neither inf nor NaN."""


@_overload(_widen)
def _choose_widen(element: Any) -> Callable[..., Any]:
    if isinstance(element, types.Float):
        return lambda element: element
    if element == types.uint16:
        return _widen_bfloat16
    return _widen_float16 if _converts_float16() else _widen_float16_by_bits


@_overload(_narrow)
def _choose_narrow(value: Any, like: Any) -> Callable[..., Any]:
    if like == types.uint16:
        return _narrow_bfloat16
    return _narrow_float16 if _converts_float16() else _narrow_float16_by_bits


@_overload(_current)
def _choose_current(master: Any, param: Any) -> Callable[..., Any]:
    def follow(master: Any, param: Any) -> Any:
        written, rounded = np.float32(_widen(param)), np.float32(_widen(_narrow(master, param)))
        return master if rounded.view(np.uint32) == written.view(np.uint32) else written

    return (lambda master, param: master) if isinstance(param, types.Float) else follow


@_overload(_as_sum)
def _choose_as_sum(source: Any, scratch: Any) -> Callable[..., Any]:
    def convert(source: Any, scratch: Any) -> Any:
        _copy(source, scratch)
        return scratch

    return (lambda source, scratch: source) if source == scratch else convert


@_overload(_store)
def _choose_store(values: Any, out: Any) -> Callable[..., Any]:
    if isinstance(out.dtype, types.Float):
        return lambda values, out: _copy(values, out)
    return lambda values, out: _round(values, out)


@_overload(_is_finite)
def _choose_is_finite(element: Any) -> Callable[..., Any]:
    if isinstance(element, types.Float):
        return lambda element: np.isfinite(element)
    if element == types.uint16:
        return lambda element: element & 0x7F80 != 0x7F80
    return lambda element: element & 0x7C00 != 0x7C00


@_jit
def _add(left: FloatArray, right: FloatArray, out: FloatArray) -> None:
    for i in range(out.size):
        out[i] = _widen(left[i]) + _widen(right[i])


@_jit
def _accumulate(total: FloatArray, more: FloatArray) -> None:
    for i in range(total.size):  # with total a third time, as out, it would not vectorise
        total[i] += _widen(more[i])


@_jit
def _copy(source: FloatArray, out: FloatArray) -> None:
    for i in range(out.size):  # an assignment of slices would look for overlaps first
        out[i] = _widen(source[i])


@_jit
def _round(values: FloatArray, out: FloatArray) -> None:
    for i in range(out.size):
        out[i] = _narrow(values[i], out[i])


@_jit
def _sum_sources(grads: FloatArray, start: int, stop: int, partials: FloatArray) -> FloatArray:
    """Sum grads[:, start:stop] as [Note: the bits of a sum] says; may return a view of it.

    ``partials`` is a stack of the sums of complete subtrees, each half as large as the one below:
    as many are joined after a pair of rows as its number has trailing one bits.
    """
    num_sources = grads.shape[0]
    numel = stop - start
    if num_sources == 1:
        only: FloatArray = _as_sum(grads[0, start:stop], partials[0, :numel])
        return only
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
    master: FloatArray,
    exp_avg: FloatArray,
    exp_avg_sq: FloatArray,
    coefficients: FloatArray,
) -> None:
    """Apply [Note: one formula, four schedules] to the master, which may be the parameter."""
    source_scale, weight_decay, param_decay = coefficients[0], coefficients[1], coefficients[2]
    m_decay, m_gain = coefficients[3], coefficients[4]
    beta2, v_gain = coefficients[5], coefficients[6]
    g_scale, m_scale = coefficients[7], coefficients[8]
    v_scale, eps = coefficients[9], coefficients[10]
    for i in range(param.size):
        p = _current(master[i], param[i])
        g = source_scale * grad[i] + weight_decay * p
        m = m_decay * exp_avg[i] + m_gain * g
        v = beta2 * exp_avg_sq[i] + (v_gain * g) * g
        u = (g_scale * g + m_scale * m) / (np.sqrt(v * v_scale) + eps)
        p = p - (param_decay * p + u)
        exp_avg[i] = m
        exp_avg_sq[i] = v
        master[i] = p


@_jit
def _is_poisoned(param: FloatArray) -> bool:
    found = False
    for i in range(param.size):  # to the end: leaving early, or counting, would be slower
        found |= not _is_finite(param[i])
    return found


@_jit
def update(
    grads: FloatArray,
    param: FloatArray,
    master: FloatArray | None,
    exp_avg: FloatArray,
    exp_avg_sq: FloatArray,
    partials: FloatArray,
    sources_start: int,
    local_zero: int,
    start: int,
    stop: int,
    segments: Any,
    coefficients: FloatArray,
) -> int:
    """Update the segments' parts within [start, stop); see ``Kernel.update``.

    Returns the position of the first block with a parameter that is not finite, or -1.
    """
    poisoned = -1
    for segment in range(segments.shape[0]):
        begin, end = max(segments[segment, 0], start), min(segments[segment, 1], stop)
        scalars = coefficients[segments[segment, 2]]
        while begin < end:
            block_end = min(end, (begin // _BLOCK_NUMEL + 1) * _BLOCK_NUMEL)
            local, local_end = begin - local_zero, block_end - local_zero
            total = _sum_sources(grads, begin - sources_start, block_end - sources_start, partials)
            block = param[begin:block_end]
            m, v = exp_avg[local:local_end], exp_avg_sq[local:local_end]
            if master is None:
                _update_block(total, block, block, m, v, scalars)
            else:
                _update_block(total, block, master[local:local_end], m, v, scalars)
                _round(master[local:local_end], block)
            if poisoned < 0 and _is_poisoned(block):
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
def reduce(
    grads: FloatArray,
    out: FloatArray | None,
    partials: FloatArray,
    first: int,
    start: int,
    stop: int,
    square_sums: FloatArray | None,
) -> None:
    """Reduce the chunks of [start, stop); see ``Kernel.reduce``.

    ``first`` is where ``out`` starts; ``partials`` has rows as long as a chunk.
    """
    accumulators = np.empty(_NUM_ACCUMULATORS, np.float64)
    chunk_numel = partials.shape[1]
    for begin in range(start, stop, chunk_numel):
        total = _sum_sources(grads, begin, begin + chunk_numel, partials)
        if out is not None:
            _store(total, out[begin - first : begin - first + chunk_numel])
        if square_sums is not None:
            square_sums[(begin - first) // chunk_numel] = _square_sum(total, accumulators)
