"""The formula of every update, its coefficients, and the step counts that they depend on.

Everything here is float64 on the host. Kernels round the coefficients once, to the dtype in which
they compute.

[Note: one formula]
Every published NAdam, Adam and RAdam is a setting of the coefficients of one update. With ``g`` the
gradient, ``m`` = exp_avg and ``v`` = exp_avg_sq::

    g  = source_scale * (mean_scale * sum_of_sources) + weight_decay * p
    m  = m_decay * m + m_gain * g
    v  = beta2 * v + (v_gain * g) * g
    p -= param_decay * p + (g_scale * g + m_scale * m) / (sqrt(v * v_scale) + eps)

The average over ranks, in parentheses, is rounded once before anything uses it. So the bits are the
same if it was computed before the update, where ``mean_scale`` is 1.

Decoupled decay is written as ``p -= lr * weight_decay * p``: a factor ``1 - lr * weight_decay``,
rounded to float32, would be off by a tenth of a decay of 3e-7, and at every step.

A ``v_scale`` of 0 leaves ``v`` out of the update, as RAdam's first steps do: the square root is 0
then, even of a ``v`` that has overflowed.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class StepCount:
    """The number of steps that a parameter has taken, and the product of their momenta.

    Attributes:
        step: The number of steps.
        mu_product: NAdam's product of ``mu(1) ... mu(step)``; 1 in the other rules.
    """

    step: int = 0
    mu_product: float = 1.0


class StepCoefficients(NamedTuple):
    """The scalars of one update, in the order in which kernels index them.

    See [Note: one formula].
    """

    source_scale: float
    weight_decay: float
    param_decay: float
    m_decay: float
    m_gain: float
    beta2: float
    v_gain: float
    g_scale: float
    m_scale: float
    v_scale: float
    eps: float
    mean_scale: float


NUM_COEFFICIENTS = len(StepCoefficients._fields)
