"""Numba loops that update parameters: at the speed of memory, without fast-math.

[Note: loops the compiler can vectorise]
Every loop indexes slices by one ``i`` from 0 (two offsets in one loop cost a factor of six) and
works on a block at a time. What a loop reads and writes stays in the first-level cache, so
summing sources costs no more than reading them, and one loop may follow another.

The update compares parameters with their masters as it goes, but the masters are rounded in a loop
of their own: with everything in one loop bfloat16 took 1.2 times as long, since fewer elements at
once fit into the window in which a processor reorders instructions.
"""

from typing import Any

import numpy as np
from numba import types

from shardopt._typing import FloatArray
from shardopt.backends.cpu import elements, sums
from shardopt.backends.cpu.elements import chosen_by_type, current, inner, is_finite, row, store
from shardopt.backends.cpu.sums import sum_rows
from shardopt.compiling import compiled

_BLOCK_NUMEL = 2048
_jit = inner(elements)
_part = inner(elements, forceinline=True)


@chosen_by_type
def _master_of(param: Any, state: Any, start: Any, stop: Any) -> Any:
    """Return elements [start, stop) of the master, or ``param`` if it is its own."""
    if isinstance(param.dtype, types.Float):
        return lambda param, state, start, stop: param
    return lambda param, state, start, stop: state[2][start:stop]


@_part
def scalars_of(coefficients: FloatArray) -> Any:
    """Return coefficients as a tuple: loops would read an array again for each element."""
    c = coefficients
    return c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11]


@_part
def moved(p: Any, total: Any, m: Any, v: Any, scalars: Any) -> Any:
    """Apply [Note: one formula] to an element; return the parameter and both moments."""
    source_scale, weight_decay, param_decay, m_decay, m_gain, beta2, v_gain = scalars[:7]
    g_scale, m_scale, v_scale, eps, mean_scale = scalars[7:]
    g = source_scale * (mean_scale * total) + weight_decay * p
    m = m_decay * m + m_gain * g
    v = beta2 * v + (v_gain * g) * g
    v_hat = v * v_scale if v_scale else v_scale  # 0, even if v has overflowed
    u = (g_scale * g + m_scale * m) / (np.sqrt(v_hat) + eps)
    return p - (param_decay * p + u), m, v


@_jit
def update_block(
    grad: FloatArray,
    param: FloatArray,
    master: FloatArray,
    exp_avg: FloatArray,
    exp_avg_sq: FloatArray,
    coefficients: FloatArray,
) -> None:
    """Update the master, which may be the parameter, and the moments."""
    scalars = scalars_of(coefficients)
    for i in range(param.size):
        p = current(master[i], param[i])
        p, m, v = moved(p, grad[i], exp_avg[i], exp_avg_sq[i], scalars)
        exp_avg[i] = m
        exp_avg_sq[i] = v
        master[i] = p


@_jit
def is_poisoned(param: FloatArray) -> bool:
    """Return whether an element is inf or NaN."""
    found = False
    for i in range(param.size):  # to the end: leaving early, or counting, would be slower
        found |= not is_finite(param[i])
    return found


@_jit
def _update_run(
    total: FloatArray, targets: Any, state: Any, start: int, stop: int, scalars: FloatArray
) -> bool:
    """Update elements [start, stop) in every target; return whether one became inf or NaN."""
    param = row(targets, 0, start, stop)
    master = _master_of(param, state, start, stop)
    update_block(total, param, master, state[0][start:stop], state[1][start:stop], scalars)
    num_written = 1 if param.itemsize == master.itemsize else 0  # the first is its own master
    for number in range(num_written, targets[0].size):
        store(master, row(targets, number, start, stop))
    poisoned: bool = is_poisoned(param)
    return poisoned


@compiled(error_model="numpy", calls=(elements, sums))
def update(sources: Any, targets: Any, state: Any, partials: FloatArray, plan: Any) -> int:
    """Update part of a shard; see ``Kernel.update`` and [Note: rows by address].

    Args:
        sources: Gradients.
        targets: Parameters.
        state: exp_avg, exp_avg_sq and, for 16-bit parameters, the master.
        partials: For ``sum_rows``; its rows are at least as long as a block.
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
            total = sum_rows(sources, begin, block_end, partials, 1.0)
            if _update_run(total, targets, state, begin, block_end, scalars) and poisoned < 0:
                poisoned = begin
            begin = block_end
    return poisoned
