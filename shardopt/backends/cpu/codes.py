"""Numba loops for states of 8 bits, and for bfloat16 without masters.

They have the form of those in ``loops``, some of which they call: see
[Note: loops the compiler can vectorise]. A loop updates a block and rounds its new moments to
levels, in the first-level cache, and another makes codes of the levels once the largest is known.
Bits stay integers until they are looked at as floats.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.np.numpy_support import carray

from shardopt._typing import FloatArray
from shardopt.backends.cpu import loops
from shardopt.backends.cpu.loops import (
    _chosen_by_type,
    _current,
    _intrinsic,
    _is_poisoned,
    _pointer,
    _row,
    _store,
    _sum_sources,
    _update_block,
    _widen,
)
from shardopt.compiling import compiled

_BLOCK_NUMEL = 256  # of the state
_BLOCK_NBYTES = 260
_RUN_NUMEL = 1024  # whose sources are summed at once
_INF_LEVEL = np.uint32(0x7F8)
_SIGN = np.uint16(0x800)  # of a level
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(error_model="numpy", calls=(loops,))(function)


@_jit
def _salt_at(salt: Any, place: Any) -> Any:
    """Return the 32 bits of a salt for a run; see [Note: random numbers of updates]."""
    value = salt + np.uint64(place >> 32) * _GOLDEN
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.uint32(value ^ value >> np.uint64(31))


@_jit
def _draw(first: Any, salt: Any, out: Any) -> None:
    """Write the random numbers of elements from place ``first`` on."""
    for i in range(out.size):
        x = np.uint32(np.uint32(first + np.uint32(i)) ^ salt)
        x = np.uint32(np.uint32(x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D))
        x = np.uint32(np.uint32(x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B))
        out[i] = np.uint32(x ^ x >> np.uint32(16))


@_intrinsic
def _address(_: Any, array: Any) -> Any:
    """Return where an array begins; ``ctypes.data`` would count a reference."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        structure = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(structure.data, ir.IntType(64))

    return types.int64(array), generate


@_jit
def _at(address: Any, like: Any, numel: Any) -> Any:
    """Return memory as an array of the dtype of ``like``.

    Parts of arrays that Numba counts references to would take longer to make than a block to
    update.
    """
    return carray(_pointer(address, like), numel)


@_jit
def _decode_signed(code: Any, below: Any) -> Any:
    both = np.uint32(code)
    magnitude = np.uint32(both & np.uint32(0x7F))
    sign = np.uint32(np.uint32(both << np.uint32(24)) & np.uint32(0x80000000))
    bits = np.uint32(np.uint32(magnitude + below) << np.uint32(20))
    return np.uint32(np.uint32(bits if magnitude else np.uint32(0)) | sign).view(np.float32)


@_jit
def _decode_unsigned(code: Any, below: Any) -> Any:
    level = np.uint32(code)
    return np.uint32(np.uint32(level + below) << np.uint32(20)).view(np.float32)


@_jit
def _level_of(scale: Any) -> Any:
    """Return the largest level of a block, from the four bytes of its scale."""
    return np.uint32(np.uint32(np.uint32(scale[3]) << 4) | np.uint32(scale[2]) >> 4)


@_jit
def _set_level(scale: Any, top: Any) -> None:
    scale[0] = scale[1] = 0
    scale[2] = np.uint8(np.uint32(top << np.uint32(4)) & np.uint32(0xF0))
    scale[3] = np.uint8(np.uint32(top >> np.uint32(4)))


@_jit
def _levels_of(grad: Any, wide: Any, codes: Any, noise: Any, levels: Any, scalars: Any) -> Any:
    """Update values of parameters, and round their new moments.

    Args:
        grad: The sums of gradients.
        wide: The values.
        codes: Of both moments, and the levels of their codes 0.
        noise: Random numbers.
        levels: Where the levels of both moments go, each behind its sign. Those of some NaN
            may be wrong: parameters have become NaN then, too.
        scalars: The coefficients.

    Returns:
        The largest level of either moment.
    """
    source_scale, weight_decay, param_decay = scalars[0], scalars[1], scalars[2]
    m_decay, m_gain, beta2, v_gain = scalars[3], scalars[4], scalars[5], scalars[6]
    g_scale, m_scale, v_scale, eps = scalars[7], scalars[8], scalars[9], scalars[10]
    mean_scale = scalars[11]
    exp_avg, exp_avg_sq, m_below, v_below = codes
    m_out, v_out = levels
    m_top, v_top = np.uint32(0), np.uint32(0)
    for i in range(wide.size):
        p = wide[i]
        g = source_scale * (mean_scale * grad[i]) + weight_decay * p
        m = np.float32(m_decay * _decode_signed(exp_avg[i], m_below) + m_gain * g)
        v = np.float32(beta2 * _decode_unsigned(exp_avg_sq[i], v_below) + (v_gain * g) * g)
        u = (g_scale * g + m_scale * m) / (np.sqrt(v * v_scale) + eps)
        wide[i] = p - (param_decay * p + u)
        level = np.uint32(np.uint32(m.view(np.uint32) + np.uint32(0x80000)) >> np.uint32(20))
        m_out[i] = np.uint16(level)
        m_top = np.uint32(max(m_top, np.uint32(level & np.uint32(0x7FF))))
        added = np.uint32(noise[i] & np.uint32(0xFFFFF))
        level = np.uint32(np.uint32(v.view(np.uint32) + added) >> np.uint32(20))
        v_out[i] = np.uint16(level)
        v_top = np.uint32(max(v_top, level))  # never negative
    return m_top, v_top


@_jit
def _cap(levels: Any) -> None:
    """Make an inf of each NaN."""
    for i in range(levels.size):
        level, sign = np.uint16(levels[i] & np.uint16(0x7FF)), np.uint16(levels[i] & _SIGN)
        levels[i] = np.uint16(np.uint16(min(level, np.uint16(_INF_LEVEL))) | sign)


@_jit
def _encode_signed(levels: Any, top: Any, codes: Any) -> None:
    below = np.int16(np.int32(top) - np.int32(127))
    lowest = np.int16(max(below, np.int16(0)))
    for i in range(levels.size):
        level = np.int16(np.uint16(levels[i] & np.uint16(0x7FF)))
        sign = np.uint8(np.uint16(np.uint16(levels[i] & _SIGN) >> np.uint16(4)))
        code = np.uint8(np.int16(level - below))
        codes[i] = np.uint8(np.uint8(code if level > lowest else np.uint8(0)) | sign)


@_jit
def _encode_unsigned(levels: Any, top: Any, codes: Any) -> None:
    below = np.int16(np.int32(top) - np.int32(255 if top else 0))  # all zeros: so are the codes
    lowest = np.int16(max(np.int16(below + np.int16(1)), np.int16(1)))
    if top == 0:
        lowest = np.int16(0)
    for i in range(levels.size):
        level = np.int16(max(np.int16(np.uint16(levels[i] & np.uint16(0x7FF))), lowest))
        codes[i] = np.uint8(np.int16(level - below))


@_jit
def _update_codes(grad: Any, wide: Any, blocks: Any, noise: Any, levels: Any, scalars: Any) -> None:
    """Update values of parameters and a block of either of their moments.

    Args:
        grad: The sums of gradients.
        wide: The values.
        blocks: The addresses of the blocks, and an array of their dtype.
        noise: Random numbers.
        levels: Memory for two blocks.
        scalars: The coefficients.
    """
    m_address, v_address, like = blocks
    numel = wide.size
    m_scale, v_scale = _at(m_address, like, 4), _at(v_address, like, 4)
    m_codes, v_codes = _at(m_address + 4, like, numel), _at(v_address + 4, like, numel)
    m_below = np.uint32(_level_of(m_scale) - np.uint32(127))
    v_top = _level_of(v_scale)
    v_below = np.uint32(v_top - np.uint32(255 if v_top else 0))  # if zero, so are all codes
    codes = m_codes, v_codes, m_below, v_below
    address = _address(levels)
    m, v = _at(address, levels, numel), _at(address + 2 * _BLOCK_NUMEL, levels, numel)
    m_top, v_top = _levels_of(grad, wide, codes, noise, (m, v), scalars)
    if max(m_top, v_top) > _INF_LEVEL:
        _cap(m)
        _cap(v)
        m_top, v_top = min(m_top, _INF_LEVEL), min(v_top, _INF_LEVEL)
    _encode_signed(m, m_top, m_codes)
    _set_level(m_scale, m_top)
    _encode_unsigned(v, v_top, v_codes)
    _set_level(v_scale, v_top)


@_chosen_by_type
def _update_moments(grad: Any, wide: Any, state: Any, start: Any, chance: Any, scalars: Any) -> Any:
    """Update values of parameters and their moments.

    ``chance`` is random numbers, and memory for the levels of a block of either moment.
    """

    def of_codes(grad: Any, wide: Any, state: Any, start: Any, chance: Any, scalars: Any) -> None:
        noise, levels = chance
        for first in range(0, wide.size, _BLOCK_NUMEL):
            numel, offset = min(_BLOCK_NUMEL, wide.size - first), 4 * first
            place = (start + first) // _BLOCK_NUMEL * _BLOCK_NBYTES
            _update_codes(
                _at(_address(grad) + offset, grad, numel),
                _at(_address(wide) + offset, wide, numel),
                (state[0][0] + place, state[1][0] + place, state[0][1]),
                _at(_address(noise) + offset, noise, numel),
                levels,
                scalars,
            )

    def of_floats(grad: Any, wide: Any, state: Any, start: Any, chance: Any, scalars: Any) -> None:
        exp_avg = _at(state[0][0] + 4 * start, state[0][1], wide.size)
        exp_avg_sq = _at(state[1][0] + 4 * start, state[1][1], wide.size)
        _update_block(grad, wide, wide, exp_avg, exp_avg_sq, scalars)

    return of_floats if isinstance(state[0][1].dtype, types.Float) else of_codes


@_chosen_by_type
def _widened(param: Any, master: Any, start: Any, scratch: Any) -> Any:
    """Return the values that the update is to change, in float32."""

    def of_master(param: Any, master: Any, start: Any, scratch: Any) -> Any:
        wide = _at(master[0] + 4 * start, master[1], param.size)
        for i in range(param.size):
            wide[i] = _current(wide[i], param[i])
        return wide

    def of_bits(param: Any, master: Any, start: Any, scratch: Any) -> Any:
        wide = _at(_address(scratch), scratch, param.size)
        for i in range(param.size):
            wide[i] = _widen(param[i])
        return wide

    if isinstance(param.dtype, types.Float):
        return lambda param, master, start, scratch: param
    return of_bits if isinstance(master, types.NoneType) else of_master


@_chosen_by_type
def _put(wide: Any, param: Any, master: Any, noise: Any) -> Any:
    """Write updated values to a copy of the parameters."""

    def by_chance(wide: Any, param: Any, master: Any, noise: Any) -> None:
        for i in range(param.size):
            value = np.float32(wide[i])
            bits = value.view(np.uint32)
            moved = np.uint32(bits + np.uint32(noise[i] >> np.uint32(16)))  # an inf stays one
            quiet = np.uint32(bits | np.uint32(0x400000))
            param[i] = np.uint16(np.uint32(moved if value == value else quiet) >> np.uint32(16))

    if isinstance(param.dtype, types.Float) or not isinstance(master, types.NoneType):
        return lambda wide, param, master, noise: _store(wide, param)
    return by_chance


@_jit
def _update_run(total: Any, targets: Any, state: Any, run: Any, scratch: Any, scalars: Any) -> bool:
    """Update a run of elements in every target; return whether one became inf or NaN."""
    start, stop, place, salt = run
    levels, values, numbers = scratch
    param = _row(targets, 0, start, stop)
    noise = _at(_address(numbers), numbers, stop - start)
    _draw(np.uint32(place), salt, noise)
    wide = _widened(param, state[2], start, values)
    _update_moments(total, wide, state, start, (noise, levels), scalars)
    num_written = 1 if param.itemsize == wide.itemsize else 0
    for number in range(num_written, targets[0].size):
        _put(wide, _row(targets, number, start, stop), state[2], noise)
    poisoned: bool = _is_poisoned(param)
    return poisoned


@_jit
def update(sources: Any, targets: Any, state: Any, partials: FloatArray, plan: Any) -> int:
    """Update part of a shard; see ``loops.update`` and [Note: rows by address].

    Args:
        sources: Gradients.
        targets: Parameters.
        state: exp_avg and exp_avg_sq, of floats or blocks, and the master or None; each an address
            and an empty array of the dtype.
        partials: For ``_sum_sources``.
        plan: Start, stop, segments, their salts, their places and coefficients, as in
            ``UpdatePlan``.

    Returns:
        The position of the first run with a parameter that is not finite, or -1.
    """
    start, stop, segments, salts, places, coefficients = plan
    scratch = (
        np.empty(2 * _BLOCK_NUMEL, np.uint16),
        np.empty(_RUN_NUMEL, np.float32),
        np.empty(_RUN_NUMEL, np.uint32),
    )
    poisoned = -1
    for segment in range(segments.shape[0]):
        begin, end = max(segments[segment, 0], start), min(segments[segment, 1], stop)
        scalars = coefficients[segments[segment, 2]]
        while begin < end:
            place = places[segment] + begin - segments[segment, 0]
            run_end = min(end, (begin // _RUN_NUMEL + 1) * _RUN_NUMEL)
            run_end = min(run_end, begin + (1 << 32) - (place & 0xFFFFFFFF))  # one salt for a run
            total = _sum_sources(sources, begin, run_end, partials)
            run = begin, run_end, place, _salt_at(salts[segment], place)
            if _update_run(total, targets, state, run, scratch, scalars) and poisoned < 0:
                poisoned = begin
            begin = run_end
    return poisoned
