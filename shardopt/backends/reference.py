"""The same passes in plain NumPy and float64: to read beside the paper, and to test kernels."""

import numpy as np

from shardopt._typing import FloatArray
from shardopt.backends.base import ALL_FINITE, UpdatePlan
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.rule.nadam import StepCoefficients


class ReferenceKernel:
    """Computes in float64 and rounds once, when it stores; slow and clear."""

    piece_numel = CHUNK_NUMEL

    def prepare(self, dtype: str, wire_dtype: str | None = None) -> None:
        """See ``Kernel.prepare``; there is nothing to do."""

    @np.errstate(invalid="ignore", over="ignore")  # poison is reported, not warned of
    def update(
        self,
        grads: FloatArray,
        param: FloatArray,
        master: FloatArray | None,
        exp_avg: FloatArray,
        exp_avg_sq: FloatArray,
        plan: UpdatePlan,
    ) -> int:
        """See ``Kernel.update``."""
        poisoned = ALL_FINITE
        for start, stop, row in plan.segments:
            c = StepCoefficients(*plan.coefficients[row].astype(np.float64))
            here, local = slice(start, stop), slice(start - plan.start, stop - plan.start)
            current = param[here] if master is None else _current(master[local], param[here])
            p = current.astype(np.float64)
            sources = grads[:, start - plan.sources_start : stop - plan.sources_start]
            g = c.source_scale * sources.astype(np.float64).sum(axis=0) + c.weight_decay * p
            m = c.m_decay * exp_avg[local] + c.m_gain * g
            v = c.beta2 * exp_avg_sq[local] + c.v_gain * g**2
            direction = (c.g_scale * g + c.m_scale * m) / (np.sqrt(v * c.v_scale) + c.eps)
            p -= c.param_decay * p + direction
            exp_avg[local], exp_avg_sq[local] = m, v
            if master is None:
                param[here] = p
            else:
                master[local] = p
                param[here] = master[local].astype(param.dtype)
            if poisoned == ALL_FINITE and not np.isfinite(param[here]).all():
                poisoned = int(start + np.flatnonzero(~np.isfinite(param[here]))[0])
        return poisoned

    def reduce(
        self,
        grads: FloatArray,
        out: FloatArray | None,
        start: int,
        stop: int,
        square_sums: FloatArray | None,
    ) -> None:
        """See ``Kernel.reduce``."""
        total = grads[:, start:stop].astype(np.float64).sum(axis=0)
        if square_sums is not None:
            square_sums[:] = (total**2).reshape(-1, CHUNK_NUMEL).sum(axis=1)
        if out is not None:
            out[:] = total


def _current(master: FloatArray, param: FloatArray) -> FloatArray:
    """The masters; where somebody has written to the parameter since, the parameter."""
    written = master.astype(param.dtype).view(np.uint16) != param.view(np.uint16)
    return np.where(written, param.astype(master.dtype), master)
