"""The kernel in plain NumPy and float64: to read beside the paper, and to test other kernels."""

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.backends.base import ALL_FINITE, Rows, UpdatePlan
from shardopt.backends.codes import SHIFT, decode, encode, part_of
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.layout.state_spec import FULL, StateForm
from shardopt.rule.coefficients import StepCoefficients
from shardopt.rule.rounding import random_numbers


class ReferenceKernel:
    """Computes in float64 and rounds once, when it stores; slow and clear."""

    piece_numel = CHUNK_NUMEL

    def __init__(self) -> None:
        self._poisoned = ALL_FINITE

    def prepare(
        self,
        dtype: str,
        wire_dtype: str | None = None,
        num_nodes: int = 1,
        form: StateForm = FULL,
    ) -> None:
        """See ``Kernel.prepare``; there is nothing to do."""

    @np.errstate(invalid="ignore", over="ignore")  # poison is reported, not warned of
    def update(
        self, sources: Rows, targets: Rows, state: Mapping[str, FloatArray], plan: UpdatePlan
    ) -> None:
        """See ``Kernel.update``."""
        grads, params = _arrays(sources), _arrays(targets)
        for index, (start, stop, row) in enumerate(plan.segments.tolist()):
            here = Span(start, stop).intersect(plan.span)
            if not here:
                continue
            coefficients = StepCoefficients(*plan.coefficients[row].astype(np.float64))
            arrays = {key: part_of(array, here) for key, array in state.items()}
            param, chance = params[0][here.slice], np.zeros(0, np.uint32)
            if plan.chance is not None:
                place = int(plan.chance.places[index]) + here.start - start
                chance = random_numbers(int(plan.chance.salts[index]), place, here.numel)
            grad = _sum([grad[here.slice] for grad in grads])
            _apply(coefficients, grad, param, arrays, chance)
            for other in params[1:]:
                other[here.slice] = param
            if not np.isfinite(param).all():
                first = plan.origin + here.start + int(np.flatnonzero(~np.isfinite(param))[0])
                known = self._poisoned != ALL_FINITE
                self._poisoned = min(first, self._poisoned) if known else first

    def take_poisoned(self) -> int:
        """See ``Kernel.take_poisoned``."""
        position, self._poisoned = self._poisoned, ALL_FINITE
        return position

    @np.errstate(invalid="ignore", over="ignore")
    def reduce(
        self,
        sources: Rows,
        out: FloatArray | None,
        span: Span,
        square_sums: NDArray[np.float64] | None,
        factor: float = 1.0,
    ) -> None:
        """See ``Kernel.reduce``."""
        total = _sum(_arrays(sources.part(span))) * factor
        if square_sums is not None:
            square_sums[:] = (total**2).reshape(-1, CHUNK_NUMEL).sum(axis=1)
        if out is not None:
            out[:] = total

    def close(self) -> None:
        """See ``Kernel.close``; there is nothing to release."""


def _arrays(rows: Rows) -> list[FloatArray]:
    """Return the rows as arrays."""
    kind = ctypes.c_byte * (rows.numel * rows.dtype.itemsize)
    memory = [memoryview(kind.from_address(address)) for address in rows.addresses.tolist()]
    return [np.frombuffer(view, rows.dtype) for view in memory]


def _sum(arrays: list[FloatArray]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.array(arrays).astype(np.float64).sum(axis=0)
    return total


def _apply(
    c: StepCoefficients,
    grad: FloatArray,
    param: FloatArray,
    state: Mapping[str, FloatArray],
    chance: NDArray[np.uint32],
) -> None:
    """Update one segment by [Note: one formula].

    Args:
        c: The coefficients.
        grad: The sum of the gradients.
        param: The parameters.
        state: Their state.
        chance: Random numbers, [numel], if anything rounds by chance.
    """
    master = state.get("master")
    kept: Any = state["exp_avg"], state["exp_avg_sq"]
    exp_avg, exp_avg_sq = kept
    if is_coded := exp_avg.ndim == 2:
        exp_avg = decode(kept[0], "signed", param.size)
        exp_avg_sq = decode(kept[1], "unsigned", param.size)
    p = (param if master is None else _current(master, param)).astype(np.float64)
    g = c.source_scale * (c.mean_scale * grad) + c.weight_decay * p
    m = c.m_decay * exp_avg + c.m_gain * g
    v = c.beta2 * exp_avg_sq + c.v_gain * g**2
    v_hat = v * c.v_scale if c.v_scale else 0.0  # even if v has overflowed
    p -= c.param_decay * p + (c.g_scale * g + c.m_scale * m) / (np.sqrt(v_hat) + c.eps)
    if is_coded:
        encode(m.astype(np.float32), kept[0], "signed")
        encode(v.astype(np.float32), kept[1], "unsigned", chance & np.uint32((1 << SHIFT) - 1))
    else:
        exp_avg[:], exp_avg_sq[:] = m, v
    if master is not None:
        master[:] = p
        param[:] = master.astype(param.dtype)
    elif param.dtype.itemsize == 2:
        param.view(np.uint16)[:] = _rounded_by_chance(p.astype(np.float32), chance)
    else:
        param[:] = p


def _rounded_by_chance(values: FloatArray, chance: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """Return values as the bits of bfloat16."""
    bits = values.view(np.uint32)
    moved = np.where(np.isfinite(values), bits + (chance >> 16), bits)
    moved = np.where(np.isnan(values), bits | 0x400000, moved)
    rounded: NDArray[np.uint16] = (moved >> 16).astype(np.uint16)
    return rounded


def _current(master: FloatArray, param: FloatArray) -> FloatArray:
    """Return the masters, or the parameters where somebody has written to them since."""
    written = master.astype(param.dtype).view(np.uint16) != param.view(np.uint16)
    return np.where(written, param.astype(master.dtype), master)
