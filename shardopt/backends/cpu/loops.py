"""Numba loops of the CPU kernel: at the speed of memory, without fast-math.

Everything that the kernel compiles is in this file, constants included: Numba's cache on disk
watches the file of the function called from Python, and would miss a change in any other.

[Note: loops the compiler can vectorise]
Every loop indexes slices by one ``i`` from 0 (two offsets in one loop cost a factor of six) and
works on a block at a time. What a loop reads and writes stays in the first-level cache, so
summing sources costs no more than reading them, and one loop may follow another.

[Note: integers that stand in for floats]
Numba has no 16-bit floats on CPUs. Arrays of integers stand in for them, uint16 for bfloat16 and
int16 for float16, and functions that are chosen by type while compiling let one set of loops serve
all dtypes. They return to 32 bits after every few operations: Numba computes with integers in
64 bits, which not every LLVM narrows again, and half of a vector's lanes would be lost.

The update compares parameters with their masters as it goes, but the masters are rounded in a loop
of their own: with everything in one loop bfloat16 took 1.2 times as long, since fewer elements at
once fit into the window in which a processor reorders instructions.

[Note: rows by address]
A set of rows is a tuple of an array of addresses and an empty array of the rows' dtype. Code is
therefore compiled by dtype, whatever the number of rows and wherever they lie. ``_row`` returns
elements of one of them as an array.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload
from numba.np.numpy_support import carray

from shardopt._typing import FloatArray
from shardopt.compiling import compiled

STAND_INS = {
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16),
    np.dtype(np.float16): np.dtype(np.int16),
}
"""Integers for 16-bit floats; see [Note: integers that stand in for floats]."""

_BLOCK_NUMEL = 2048
_NUM_ACCUMULATORS = 64


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use."""
    return compiled(error_model="numpy")(function)


_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic
_pointer_to: Callable[..., Any] = types.CPointer


def _chosen_by_type(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function for compiled code; its body is what ``choose`` returns for the types."""

    def stub(*arguments: Any) -> Any:
        raise NotImplementedError

    overload(stub, strict=False)(choose)
    return stub


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
    """Return whether the processor has instructions that convert float16, as nearly all have.

    Without them LLVM would call a C library that need not be installed. Converted by bits, an
    update takes about twice as long.
    """
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return triple.startswith(("aarch64", "arm64")) or "+f16c" in features.split(",")


@_intrinsic
def _pointer(_: Any, address: Any, like: Any) -> Any:
    """Return an address as a pointer to elements of the dtype of ``like``."""
    pointer = _pointer_to(like.dtype)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, like), generate


@_chosen_by_type
def _widen(element: Any) -> Any:
    """Return the element, exactly, in the dtype that kernels compute in."""
    if isinstance(element, types.Float):
        return lambda element: element
    if element == types.uint16:
        return _widen_bfloat16
    return _widen_float16 if _converts_float16() else _widen_float16_by_bits


@_chosen_by_type
def _widen_to(element: Any, like: Any) -> Any:
    """Return the element, exactly, in the dtype of ``like``, a dtype that kernels compute in."""
    if like == types.float64:
        return lambda element, like: np.float64(_widen(element))
    return lambda element, like: _widen(element)


@_chosen_by_type
def _narrow(value: Any, like: Any) -> Any:
    """Return the value rounded to the nearest in the 16-bit dtype of ``like``; NaN stays NaN."""
    if like == types.uint16:
        return _narrow_bfloat16
    return _narrow_float16 if _converts_float16() else _narrow_float16_by_bits


@_chosen_by_type
def _current(master: Any, param: Any) -> Any:
    """Return the master, or the parameter if somebody wrote to it or it is its own master."""

    def follow(master: Any, param: Any) -> Any:
        written, rounded = np.float32(_widen(param)), np.float32(_widen(_narrow(master, param)))
        return master if rounded.view(np.uint32) == written.view(np.uint32) else written

    return (lambda master, param: master) if isinstance(param, types.Float) else follow


@_chosen_by_type
def _master_of(param: Any, state: Any, start: Any, stop: Any) -> Any:
    """Return elements [start, stop) of the master, or ``param`` if it is its own."""
    if isinstance(param.dtype, types.Float):
        return lambda param, state, start, stop: param
    return lambda param, state, start, stop: state[2][start:stop]


@_chosen_by_type
def _as_sum(source: Any, scratch: Any) -> Any:
    """Return the only source in the dtype of the sum: itself, or converted into ``scratch``."""

    def convert(source: Any, scratch: Any) -> Any:
        _copy(source, scratch)
        return scratch

    return (lambda source, scratch: source) if source == scratch else convert


@_chosen_by_type
def _store(values: Any, out: Any) -> Any:
    """Copy computed values to ``out``, rounding them if it has another dtype."""
    if isinstance(out.dtype, types.Float):
        return lambda values, out: _copy(values, out)
    return lambda values, out: _round(values, out)


@_chosen_by_type
def _is_finite(element: Any) -> Any:
    """Return whether the element is neither inf nor NaN."""
    if isinstance(element, types.Float):
        return lambda element: np.isfinite(element)
    if element == types.uint16:
        return lambda element: element & 0x7F80 != 0x7F80
    return lambda element: element & 0x7C00 != 0x7C00


@_jit
def _row(rows: Any, number: int, start: int, stop: int) -> FloatArray:
    """Return elements [start, stop) of a row as an array; see [Note: rows by address]."""
    addresses, like = rows
    first = addresses[number] + start * like.itemsize
    array: FloatArray = carray(_pointer(first, like), stop - start)
    return array


@_jit
def _add(left: FloatArray, right: FloatArray, out: FloatArray) -> None:
    for i in range(out.size):
        out[i] = _widen_to(left[i], out[i]) + _widen_to(right[i], out[i])


@_jit
def _add_four(rows: Any, first: int, start: int, stop: int, out: FloatArray) -> None:
    """Add four rows in one loop: a loop for each sum of two took 1.1 times as long."""
    a, b = _row(rows, first, start, stop), _row(rows, first + 1, start, stop)
    c, d = _row(rows, first + 2, start, stop), _row(rows, first + 3, start, stop)
    for i in range(out.size):
        left = _widen_to(a[i], out[i]) + _widen_to(b[i], out[i])
        out[i] = left + (_widen_to(c[i], out[i]) + _widen_to(d[i], out[i]))


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
def _sum_sources(sources: Any, start: int, stop: int, partials: FloatArray) -> FloatArray:
    """Sum elements [start, stop) of the rows by [Note: the bits of a sum].

    ``partials`` is a stack of the sums of complete subtrees, each half as large as the one below:
    after four rows, as many are joined as the number of the four has trailing one bits. The result
    is in ``partials``, or the row itself if it is the only one and has the dtype.
    """
    num_sources, numel = sources[0].size, stop - start
    if num_sources == 1:
        only: FloatArray = _as_sum(_row(sources, 0, start, stop), partials[0, :numel])
        return only
    depth = 0
    for number in range(0, num_sources - 3, 4):
        _add_four(sources, number, start, stop, partials[depth, :numel])
        depth += 1
        bits = number >> 2
        while bits & 1:
            depth -= 1
            _accumulate(partials[depth - 1, :numel], partials[depth, :numel])
            bits >>= 1
    if num_sources & 2:
        number = num_sources & -4
        left, right = _row(sources, number, start, stop), _row(sources, number + 1, start, stop)
        _add(left, right, partials[depth, :numel])
        depth += 1
    if num_sources & 1:
        _accumulate(partials[depth - 1, :numel], _row(sources, num_sources - 1, start, stop))
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
    """Apply [Note: one formula] to the master, which may be the parameter."""
    source_scale, weight_decay, param_decay = coefficients[0], coefficients[1], coefficients[2]
    m_decay, m_gain = coefficients[3], coefficients[4]
    beta2, v_gain = coefficients[5], coefficients[6]
    g_scale, m_scale = coefficients[7], coefficients[8]
    v_scale, eps, mean_scale = coefficients[9], coefficients[10], coefficients[11]
    for i in range(param.size):
        p = _current(master[i], param[i])
        g = source_scale * (mean_scale * grad[i]) + weight_decay * p
        m = m_decay * exp_avg[i] + m_gain * g
        v = beta2 * exp_avg_sq[i] + (v_gain * g) * g
        v_hat = v * v_scale if v_scale else v_scale  # 0, even if v has overflowed
        u = (g_scale * g + m_scale * m) / (np.sqrt(v_hat) + eps)
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
def _update_run(
    total: FloatArray, targets: Any, state: Any, start: int, stop: int, scalars: FloatArray
) -> bool:
    """Update elements [start, stop) in every target; return whether one became inf or NaN."""
    param = _row(targets, 0, start, stop)
    master = _master_of(param, state, start, stop)
    _update_block(total, param, master, state[0][start:stop], state[1][start:stop], scalars)
    num_written = 1 if param.itemsize == master.itemsize else 0  # the first is its own master
    for number in range(num_written, targets[0].size):
        _store(master, _row(targets, number, start, stop))
    poisoned: bool = _is_poisoned(param)
    return poisoned


@_jit
def update(sources: Any, targets: Any, state: Any, partials: FloatArray, plan: Any) -> int:
    """Update part of a shard; see ``Kernel.update`` and [Note: rows by address].

    Args:
        sources: Gradients.
        targets: Parameters.
        state: exp_avg, exp_avg_sq and, for 16-bit parameters, the master.
        partials: For ``_sum_sources``; its rows are at least as long as a block.
        plan: Start, stop, segments and coefficients, as in ``UpdatePlan``.

    Returns:
        The position of the first block with a parameter that is not finite, or -1.
    """
    start, stop, segments, coefficients = plan
    poisoned = -1
    for segment in range(segments.shape[0]):
        begin, end = max(segments[segment, 0], start), min(segments[segment, 1], stop)
        scalars = coefficients[segments[segment, 2]]
        while begin < end:
            block_end = min(end, (begin // _BLOCK_NUMEL + 1) * _BLOCK_NUMEL)
            total = _sum_sources(sources, begin, block_end, partials)
            if _update_run(total, targets, state, begin, block_end, scalars) and poisoned < 0:
                poisoned = begin
            begin = block_end
    return poisoned


@_jit
def _scale_one(rows: Any, start: int, stop: int, scale: Any, out: FloatArray) -> None:
    a = _row(rows, 0, start, stop)
    for i in range(out.size):
        out[i] = _widen_to(a[i], out[i]) * scale


@_jit
def _scale_two(rows: Any, start: int, stop: int, scale: Any, out: FloatArray) -> None:
    a, b = _row(rows, 0, start, stop), _row(rows, 1, start, stop)
    for i in range(out.size):
        out[i] = (_widen_to(a[i], out[i]) + _widen_to(b[i], out[i])) * scale


@_jit
def _scale_four(rows: Any, start: int, stop: int, scale: Any, out: FloatArray) -> None:
    a, b = _row(rows, 0, start, stop), _row(rows, 1, start, stop)
    c, d = _row(rows, 2, start, stop), _row(rows, 3, start, stop)
    for i in range(out.size):
        left = _widen_to(a[i], out[i]) + _widen_to(b[i], out[i])
        out[i] = (left + (_widen_to(c[i], out[i]) + _widen_to(d[i], out[i]))) * scale


@_jit
def _scale(values: FloatArray, scale: Any) -> None:
    for i in range(values.size):  # with an array for the result, even the same, it is not fast
        values[i] *= scale


@_jit
def _scaled_sum(
    sources: Any, start: int, stop: int, partials: FloatArray, factor: float
) -> FloatArray:
    """Sum elements [start, stop) of the rows, times a factor; see ``_sum_sources``.

    One, two or four rows take a single loop.
    """
    if factor == 1.0:
        total: FloatArray = _sum_sources(sources, start, stop, partials)
        return total
    num_sources, scale = sources[0].size, partials.dtype.type(factor)
    scaled = partials[0, : stop - start]
    if num_sources == 1:
        _scale_one(sources, start, stop, scale, scaled)
    elif num_sources == 2:
        _scale_two(sources, start, stop, scale, scaled)
    elif num_sources == 4:
        _scale_four(sources, start, stop, scale, scaled)
    else:
        _sum_sources(sources, start, stop, partials)
        _scale(scaled, scale)
    return scaled


@_jit
def _square_sum(values: FloatArray, accumulators: FloatArray) -> float:
    """Sum squares in float64, every 64th in one accumulator: a fixed order that vectorises."""
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
def reduce(sources: Any, out: Any, partials: FloatArray, span: Any, square_sums: Any) -> None:
    """Reduce the chunks of a span; see ``Kernel.reduce``.

    ``span`` is start, stop and the factor; ``out`` and ``square_sums`` begin at its start. The rows
    of ``partials`` are as long as a chunk.
    """
    start, stop, factor = span
    accumulators = np.empty(_NUM_ACCUMULATORS, np.float64)
    chunk_numel = partials.shape[1]
    for begin in range(start, stop, chunk_numel):
        total = _scaled_sum(sources, begin, begin + chunk_numel, partials, factor)
        if out is not None:
            _store(total, out[begin - start : begin - start + chunk_numel])
        if square_sums is not None:
            square_sums[(begin - start) // chunk_numel] = _square_sum(total, accumulators)
