"""Numba loops for states of 8 bits, and for bfloat16 without masters.

They have the form of those in ``loops``, some of which they call: see
[Note: loops the compiler can vectorise]. All that a run of elements needs stays in the first-level
cache: the moments are decoded into arrays of float32, the update is the one of moments in float32,
and then each block is rounded to levels, of which codes are made once the largest is known. Bits
stay integers until they are looked at as floats.

A block takes less time than a few calls of functions that Numba compiles, as each counts the
references of all its arrays and looks for those that overlap. So all of them become part of
``update``.
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
    return compiled(error_model="numpy", forceinline=True, calls=(loops,))(function)


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
def _decode_signed(codes: Any, below: Any, out: Any) -> None:
    """Write what codes stand for; ``below`` is the level of code 0, shifted to its place."""
    for i in range(out.size):
        extended = np.uint32(np.int32(np.int8(codes[i])))
        both = np.uint32(np.uint32(extended << np.uint32(20)) & np.uint32(0x87F00000))
        moved = np.uint32(both + below)
        out[i] = np.uint32(moved if np.uint32(both & np.uint32(0x7F00000)) else both).view(
            np.float32
        )


@_jit
def _decode_unsigned(codes: Any, below: Any, out: Any) -> None:
    for i in range(out.size):
        level = np.uint32(np.uint32(codes[i]) << np.uint32(20))
        out[i] = np.uint32(level + below).view(np.float32)


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
def _levels_signed(values: Any, levels: Any) -> Any:
    """Round values to levels, each behind its sign, and return the largest.

    Those of some NaN may be wrong: parameters have become NaN then, too.
    """
    top = np.uint32(0)
    for i in range(levels.size):
        bits = np.uint32(np.float32(values[i]).view(np.uint32) + np.uint32(0x80000))
        levels[i] = np.uint16(np.uint32(bits >> np.uint32(20)))
        top = np.uint32(max(top, np.uint32(bits & np.uint32(0x7FFFFFFF))))
    return np.uint32(top >> np.uint32(20))


@_jit
def _levels_unsigned(values: Any, noise: Any, levels: Any) -> Any:
    """Round values, which are never negative, to levels by chance, and return the largest."""
    top = np.uint32(0)
    for i in range(levels.size):
        added = np.uint32(noise[i] & np.uint32(0xFFFFF))
        bits = np.uint32(np.float32(values[i]).view(np.uint32) + added)
        levels[i] = np.uint16(np.uint32(bits >> np.uint32(20)))
        top = np.uint32(max(top, bits))
    return np.uint32(top >> np.uint32(20))


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
def _decode_block(blocks: Any, moments: Any) -> None:
    """Decode a block of either moment.

    Args:
        blocks: Their addresses, and an array of their dtype.
        moments: Where the values go.
    """
    m_address, v_address, like = blocks
    m, v = moments
    m_top, v_top = _level_of(_at(m_address, like, 4)), _level_of(_at(v_address, like, 4))
    m_below = np.uint32(np.uint32(m_top - np.uint32(127)) << np.uint32(20))
    v_below = np.uint32(v_top - np.uint32(255 if v_top else 0))  # if zero, so are all codes
    _decode_signed(_at(m_address + 4, like, m.size), m_below, m)
    _decode_unsigned(_at(v_address + 4, like, v.size), np.uint32(v_below << np.uint32(20)), v)


@_jit
def _encode_block(blocks: Any, moments: Any, noise: Any, levels: Any) -> None:
    """Encode a block of either moment; ``levels`` is memory for two blocks."""
    m_address, v_address, like = blocks
    numel = moments[0].size
    address = _address(levels)
    m, v = _at(address, levels, numel), _at(address + 2 * _BLOCK_NUMEL, levels, numel)
    m_top, v_top = _levels_signed(moments[0], m), _levels_unsigned(moments[1], noise, v)
    if max(m_top, v_top) > _INF_LEVEL:
        _cap(m)
        _cap(v)
        m_top, v_top = min(m_top, _INF_LEVEL), min(v_top, _INF_LEVEL)
    _encode_signed(m, m_top, _at(m_address + 4, like, numel))
    _set_level(_at(m_address, like, 4), m_top)
    _encode_unsigned(v, v_top, _at(v_address + 4, like, numel))
    _set_level(_at(v_address, like, 4), v_top)


@_jit
def _block_at(state: Any, place: Any) -> Any:
    """Return the addresses of a block of either moment, and an array of their dtype."""
    offset = place // _BLOCK_NUMEL * _BLOCK_NBYTES
    return state[0][0] + offset, state[1][0] + offset, state[0][1]


@_chosen_by_type
def _update_moments(
    grad: Any, wide: Any, state: Any, start: Any, scratch: Any, scalars: Any
) -> Any:
    """Update values of parameters and their moments.

    ``scratch`` is random numbers, and memory for both moments and for the levels of a block of
    either.
    """

    def of_codes(grad: Any, wide: Any, state: Any, start: Any, scratch: Any, scalars: Any) -> None:
        noise, moments, levels = scratch
        m, v, numbers = _address(moments), _address(moments) + 4 * _RUN_NUMEL, _address(noise)
        for first in range(0, wide.size, _BLOCK_NUMEL):
            numel, offset = min(_BLOCK_NUMEL, wide.size - first), 4 * first
            both = _at(m + offset, moments, numel), _at(v + offset, moments, numel)
            _decode_block(_block_at(state, start + first), both)
        both = _at(m, moments, wide.size), _at(v, moments, wide.size)
        _update_block(grad, wide, wide, both[0], both[1], scalars)
        for first in range(0, wide.size, _BLOCK_NUMEL):
            numel, offset = min(_BLOCK_NUMEL, wide.size - first), 4 * first
            both = _at(m + offset, moments, numel), _at(v + offset, moments, numel)
            drawn = _at(numbers + offset, noise, numel)
            _encode_block(_block_at(state, start + first), both, drawn, levels)

    def of_floats(grad: Any, wide: Any, state: Any, start: Any, scratch: Any, scalars: Any) -> None:
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
    levels, moments, values, numbers = scratch
    param = _row(targets, 0, start, stop)
    noise = _at(_address(numbers), numbers, stop - start)
    _draw(np.uint32(place), salt, noise)
    wide = _widened(param, state[2], start, values)
    _update_moments(total, wide, state, start, (noise, moments, levels), scalars)
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
        np.empty(2 * _RUN_NUMEL, np.float32),
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
