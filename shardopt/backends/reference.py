"""The kernel in plain NumPy and float64: to read beside the paper, and to test other kernels."""

import ctypes
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.backends.base import ALL_FINITE, Rows, UpdatePlan
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.rule.nadam import StepCoefficients


class ReferenceKernel:
    """Computes in float64 and rounds once, when it stores; slow and clear."""

    piece_numel = CHUNK_NUMEL

    def __init__(self) -> None:
        self._poisoned = ALL_FINITE

    def prepare(self, dtype: str, wire_dtype: str | None = None, num_nodes: int = 1) -> None:
        """See ``Kernel.prepare``; there is nothing to do."""

    @np.errstate(invalid="ignore", over="ignore")  # poison is reported, not warned of
    def update(
        self, sources: Rows, targets: Rows, state: Mapping[str, FloatArray], plan: UpdatePlan
    ) -> None:
        """See ``Kernel.update``."""
        grads, params = _arrays(sources), _arrays(targets)
        for start, stop, row in plan.segments.tolist():
            here = Span(start, stop).intersect(plan.span)
            coefficients = StepCoefficients(*plan.coefficients[row].astype(np.float64))
            arrays = {key: array[here.slice] for key, array in state.items()}
            param = params[0][here.slice]
            _apply(coefficients, [grad[here.slice] for grad in grads], param, arrays)
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
    c: StepCoefficients, grads: list[FloatArray], param: FloatArray, state: Mapping[str, FloatArray]
) -> None:
    """Update one segment by [Note: one formula, four schedules]."""
    exp_avg, exp_avg_sq, master = state["exp_avg"], state["exp_avg_sq"], state.get("master")
    p = (param if master is None else _current(master, param)).astype(np.float64)
    g = c.source_scale * _sum(grads) + c.weight_decay * p
    m = c.m_decay * exp_avg + c.m_gain * g
    v = c.beta2 * exp_avg_sq + c.v_gain * g**2
    p -= c.param_decay * p + (c.g_scale * g + c.m_scale * m) / (np.sqrt(v * c.v_scale) + c.eps)
    exp_avg[:], exp_avg_sq[:] = m, v
    if master is None:
        param[:] = p
    else:
        master[:] = p
        param[:] = master.astype(param.dtype)


def _current(master: FloatArray, param: FloatArray) -> FloatArray:
    """Return the masters, or the parameters where somebody has written to them since."""
    written = master.astype(param.dtype).view(np.uint16) != param.view(np.uint16)
    return np.where(written, param.astype(master.dtype), master)
