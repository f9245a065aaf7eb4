"""Numba loops for states of 8 bits, and for bfloat16 without masters.

They have the form of those in ``loops``, some of which they call: see
[Note: loops the compiler can vectorise]. All that a run of elements needs stays in the first-level
cache. Random numbers are drawn for the whole run. Then, block by block, one loop decodes the
moments, updates, and rounds to levels: a processor does most of that while it waits for the
update's root and division. Another makes codes of the levels, as the largest is known by then. Bits
stay integers until they are looked at as floats.

A block takes less time than a few calls of functions that Numba compiles, as each counts the
references of all its arrays and looks for those that overlap. So all of them become part of
``update``.
"""

from typing import Any

import numpy as np
from numba import types

from shardopt.backends.cpu import elements, loops, sums
from shardopt.backends.cpu.elements import (
    address_of,
    array_at,
    chosen_by_type,
    current,
    inner,
    row,
    store,
    widen,
)
from shardopt.backends.cpu.loops import is_poisoned, moved, scalars_of, update_block
from shardopt.backends.cpu.sums import sum_rows
from shardopt.compiling import compiled

_BLOCK_NUMEL = 256  # of the state
_HALF_NUMEL = 128
_BLOCK_NBYTES = 260
_RUN_NUMEL = 1024  # whose sources are summed at once
_INF_LEVEL = np.uint32(0x7F8)
_SIGN = np.uint16(0x800)  # of a level
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

_jit = inner(elements, loops, sums, forceinline=True)


def scratch() -> tuple[Any, ...]:
    """Allocate memory for levels, parameters in float32, and random numbers."""
    return (
        np.empty(2 * _BLOCK_NUMEL, np.uint16),
        np.empty(_RUN_NUMEL, np.float32),
        np.empty(_RUN_NUMEL, np.uint32),
    )


@_jit
def _salt_at(salt: Any, place: Any) -> Any:
    """Return the 32 bits of a salt for a run; see [Note: random numbers of updates]."""
    value = salt + np.uint64(place >> 32) * _GOLDEN
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.uint32(value ^ value >> np.uint64(31))


@_jit
def _draw(first: Any, salt: Any, noise: Any) -> None:
    """Write the random numbers of whole blocks of elements, from place ``first`` on."""
    begin = address_of(noise)
    for block in range(0, noise.size, _BLOCK_NUMEL):
        place = np.uint32(first + np.uint32(block))
        lower = array_at(begin + 4 * block, noise, _HALF_NUMEL)
        upper = array_at(begin + 4 * (block + _HALF_NUMEL), noise, _HALF_NUMEL)
        for i in range(_HALF_NUMEL):
            x = np.uint32(np.uint32(place + np.uint32(i)) ^ salt)
            x = np.uint32(np.uint32(x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D))
            x = np.uint32(np.uint32(x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B))
            x = np.uint32(x ^ x >> np.uint32(16))
            lower[i] = x
            upper[i] = np.uint32(np.uint32(x << np.uint32(16)) | np.uint32(x >> np.uint32(16)))


@_jit
def _decoded_signed(code: Any, below: Any) -> Any:
    """Return what a code stands for; ``below`` is the level of code 0, shifted to its place."""
    extended = np.uint32(np.int32(np.int8(code)))
    both = np.uint32(np.uint32(extended << np.uint32(20)) & np.uint32(0x87F00000))
    moved_up = np.uint32(both + below)
    return np.uint32(moved_up if np.uint32(both & np.uint32(0x7F00000)) else both).view(np.float32)


@_jit
def _decoded_unsigned(code: Any, below: Any) -> Any:
    return np.uint32(np.uint32(np.uint32(code) << np.uint32(20)) + below).view(np.float32)


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
def _update_block(grad: Any, wide: Any, blocks: Any, noise: Any, levels: Any, scalars: Any) -> Any:
    """Update a block of parameters, and round both moments to levels.

    All is in one loop: it waits for a division and a root, which leaves time for the rest.

    Args:
        grad: The sum of the gradients.
        wide: The parameters, in float32.
        blocks: The blocks of the moments; see ``_block_at``.
        noise: Random numbers.
        levels: Where the levels go, each of exp_avg behind its sign.
        scalars: See ``scalars_of``.

    Returns:
        The largest level of either moment. Those of some NaN may be wrong: parameters have become
        NaN then, too.
    """
    m_address, v_address, like = blocks
    numel = wide.size
    m_codes, v_codes = array_at(m_address + 4, like, numel), array_at(v_address + 4, like, numel)
    m_top = _level_of(array_at(m_address, like, 4))
    v_top = _level_of(array_at(v_address, like, 4))
    m_below = np.uint32(np.uint32(m_top - np.uint32(127)) << np.uint32(20))
    v_below = np.uint32(v_top - np.uint32(255 if v_top else 0))  # if zero, so are all codes
    v_below = np.uint32(v_below << np.uint32(20))
    m_levels, v_levels = levels
    m_most, v_most = np.uint32(0), np.uint32(0)
    for i in range(numel):
        m, v = _decoded_signed(m_codes[i], m_below), _decoded_unsigned(v_codes[i], v_below)
        p, m, v = moved(wide[i], grad[i], m, v, scalars)
        wide[i] = p
        m_bits = np.uint32(np.float32(m).view(np.uint32) + np.uint32(0x80000))
        m_levels[i] = np.uint16(np.uint32(m_bits >> np.uint32(20)))
        m_most = np.uint32(max(m_most, np.uint32(m_bits & np.uint32(0x7FFFFFFF))))
        added = np.uint32(noise[i] & np.uint32(0xFFFFF))
        v_bits = np.uint32(np.float32(v).view(np.uint32) + added)  # v is never negative
        v_levels[i] = np.uint16(np.uint32(v_bits >> np.uint32(20)))
        v_most = np.uint32(max(v_most, v_bits))
    return np.uint32(m_most >> np.uint32(20)), np.uint32(v_most >> np.uint32(20))


@_jit
def _encode_block(blocks: Any, levels: Any, tops: Any) -> None:
    """Make codes of the levels of both moments, whose largest are ``tops``."""
    m_address, v_address, like = blocks
    (m_levels, v_levels), (m_top, v_top) = levels, tops
    numel = m_levels.size
    if max(m_top, v_top) > _INF_LEVEL:
        _cap(m_levels)
        _cap(v_levels)
        m_top, v_top = min(m_top, _INF_LEVEL), min(v_top, _INF_LEVEL)
    _encode_signed(m_levels, m_top, array_at(m_address + 4, like, numel))
    _set_level(array_at(m_address, like, 4), m_top)
    _encode_unsigned(v_levels, v_top, array_at(v_address + 4, like, numel))
    _set_level(array_at(v_address, like, 4), v_top)


@_jit
def _block_at(state: Any, place: Any) -> Any:
    """Return the addresses of a block of either moment, and an array of their dtype."""
    offset = place // _BLOCK_NUMEL * _BLOCK_NBYTES
    return state[0][0] + offset, state[1][0] + offset, state[0][1]


@chosen_by_type
def _update_moments(
    grad: Any, wide: Any, state: Any, start: Any, scratch: Any, coefficients: Any
) -> Any:
    """Update values of parameters and their moments.

    ``scratch`` is random numbers, and memory for the levels of a block of either moment.
    """

    def of_codes(
        grad: Any, wide: Any, state: Any, start: Any, scratch: Any, coefficients: Any
    ) -> None:
        noise, levels = scratch
        scalars, memory = scalars_of(coefficients), address_of(levels)
        for first in range(0, wide.size, _BLOCK_NUMEL):
            numel, offset = min(_BLOCK_NUMEL, wide.size - first), 4 * first
            blocks = _block_at(state, start + first)
            both = (
                array_at(memory, levels, numel),
                array_at(memory + 2 * _BLOCK_NUMEL, levels, numel),
            )
            tops = _update_block(
                array_at(address_of(grad) + offset, grad, numel),
                array_at(address_of(wide) + offset, wide, numel),
                blocks,
                array_at(address_of(noise) + offset, noise, numel),
                both,
                scalars,
            )
            _encode_block(blocks, both, tops)

    def of_floats(
        grad: Any, wide: Any, state: Any, start: Any, scratch: Any, coefficients: Any
    ) -> None:
        exp_avg = array_at(state[0][0] + 4 * start, state[0][1], wide.size)
        exp_avg_sq = array_at(state[1][0] + 4 * start, state[1][1], wide.size)
        update_block(grad, wide, wide, exp_avg, exp_avg_sq, coefficients)

    return of_floats if isinstance(state[0][1].dtype, types.Float) else of_codes


@chosen_by_type
def _widened(param: Any, master: Any, start: Any, scratch: Any) -> Any:
    """Return the values that the update is to change, in float32."""

    def of_master(param: Any, master: Any, start: Any, scratch: Any) -> Any:
        wide = array_at(master[0] + 4 * start, master[1], param.size)
        for i in range(param.size):
            wide[i] = current(wide[i], param[i])
        return wide

    def of_bits(param: Any, master: Any, start: Any, scratch: Any) -> Any:
        wide = array_at(address_of(scratch), scratch, param.size)
        for i in range(param.size):
            wide[i] = widen(param[i])
        return wide

    if isinstance(param.dtype, types.Float):
        return lambda param, master, start, scratch: param
    return of_bits if isinstance(master, types.NoneType) else of_master


@chosen_by_type
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
        return lambda wide, param, master, noise: store(wide, param)
    return by_chance


@_jit
def _update_run(total: Any, targets: Any, state: Any, run: Any, scratch: Any, scalars: Any) -> bool:
    """Update a run of elements in every target; return whether one became inf or NaN."""
    start, stop, place, salt = run
    levels, values, noise = scratch
    param = row(targets, 0, start, stop)
    numel = (stop - start + _BLOCK_NUMEL - 1) // _BLOCK_NUMEL * _BLOCK_NUMEL
    _draw(np.uint32(place), salt, array_at(address_of(noise), noise, numel))
    wide = _widened(param, state[2], start, values)
    _update_moments(total, wide, state, start, (noise, levels), scalars)
    num_written = 1 if param.itemsize == wide.itemsize else 0
    for number in range(num_written, targets[0].size):
        _put(wide, row(targets, number, start, stop), state[2], noise)
    poisoned: bool = is_poisoned(param)
    return poisoned


@compiled(error_model="numpy", calls=(elements, loops, sums))
def update(sources: Any, targets: Any, state: Any, memory: Any, plan: Any) -> int:
    """Update part of a shard; see ``loops.update`` and [Note: rows by address].

    Args:
        sources: Gradients.
        targets: Parameters.
        state: exp_avg and exp_avg_sq, of floats or blocks, and the master or None; each an address
            and an empty array of the dtype.
        memory: For ``sum_rows``, and what ``scratch`` allocates.
        plan: Start, stop, segments, their salts, their places and coefficients, as in
            ``UpdatePlan``.

    Returns:
        The position of the first run with a parameter that is not finite, or -1.
    """
    start, stop, segments, salts, places, coefficients = plan
    partials, scratch = memory
    poisoned = -1
    for segment in range(segments.shape[0]):
        begin, end = max(segments[segment, 0], start), min(segments[segment, 1], stop)
        scalars = coefficients[segments[segment, 2]]
        while begin < end:
            place = places[segment] + begin - segments[segment, 0]
            run_end = min(end, (begin // _RUN_NUMEL + 1) * _RUN_NUMEL)
            run_end = min(run_end, begin + (1 << 32) - (place & 0xFFFFFFFF))  # one salt for a run
            total = sum_rows(sources, begin, run_end, partials, 1.0)
            run = begin, run_end, place, _salt_at(salts[segment], place)
            if _update_run(total, targets, state, run, scratch, scalars) and poisoned < 0:
                poisoned = begin
            begin = run_end
    return poisoned
