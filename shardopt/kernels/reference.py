"""The same passes in plain NumPy and float64: to read beside the paper, and to test kernels."""

import numpy as np

from shardopt.kernels.base import ALL_FINITE, FloatArray, UpdatePlan
from shardopt.nadam import StepCoefficients
from shardopt.partition import CHUNK_NUMEL


class ReferenceKernel:
    """Computes in float64 and rounds once, when it stores; slow and clear."""

    def prepare(self, dtype: str) -> None:
        """See ``Kernel.prepare``; there is nothing to do."""

    def update(
        self,
        grads: FloatArray,
        param: FloatArray,
        exp_avg: FloatArray,
        exp_avg_sq: FloatArray,
        plan: UpdatePlan,
    ) -> int:
        """See ``Kernel.update``."""
        poisoned = ALL_FINITE
        for start, stop, row in plan.segments:
            c = StepCoefficients(*plan.coefficients[row].astype(np.float64))
            here, local = slice(start, stop), slice(start - plan.start, stop - plan.start)
            p = param[here].astype(np.float64)
            g = c.source_scale * grads[:, here].astype(np.float64).sum(axis=0) + c.weight_decay * p
            m = c.m_decay * exp_avg[local] + c.m_gain * g
            v = c.beta2 * exp_avg_sq[local] + c.v_gain * g**2
            with np.errstate(invalid="ignore"):  # inf / inf: poison is reported, not warned of
                direction = (c.g_scale * g + c.m_scale * m) / (np.sqrt(v * c.v_scale) + c.eps)
            param[here], exp_avg[local], exp_avg_sq[local] = c.param_scale * p - direction, m, v
            if poisoned == ALL_FINITE and not np.isfinite(param[here]).all():
                poisoned = int(start + np.flatnonzero(~np.isfinite(param[here]))[0])
        return poisoned

    def reduce(
        self, grads: FloatArray, out: FloatArray, start: int, stop: int, square_sums: FloatArray
    ) -> None:
        """See ``Kernel.reduce``."""
        total = grads[:, start:stop].astype(np.float64).sum(axis=0)
        square_sums[:] = (total**2).reshape(-1, CHUNK_NUMEL).sum(axis=1)
        out[start:stop] = total
