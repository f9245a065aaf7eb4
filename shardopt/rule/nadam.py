"""NAdam's scalars: hyperparameters, momentum schedules, and the coefficients of one step.

Everything here is float64 on the host. Kernels round the coefficients once, to the dtype in which
they compute.

[Note: one formula, four schedules]
Every published NAdam is a setting of the coefficients of one update. With ``g`` the gradient,
``m`` = exp_avg and ``v`` = exp_avg_sq::

    g  = source_scale * (mean_scale * sum_of_sources) + weight_decay * p
    m  = m_decay * m + m_gain * g
    v  = beta2 * v + (v_gain * g) * g
    p -= param_decay * p + (g_scale * g + m_scale * m) / (sqrt(v * v_scale) + eps)

The average over ranks, in parentheses, is rounded once before anything uses it. So the bits are the
same if it was computed before the update, where ``mean_scale`` is 1.

Decoupled decay is written as ``p -= lr * weight_decay * p``: a factor ``1 - lr * weight_decay``,
rounded to float32, would be off by a tenth of a decay of 3e-7, and at every step.

Sources: T. Dozat, "Incorporating Nesterov momentum into Adam", 2016, with the schedule
``mu(t) = beta1 * (1 - 0.5 * 0.96**(t * momentum_decay))`` as in torch.optim.NAdam; Keras fixes
``momentum_decay`` at 1; optax.nadam keeps ``mu(t) = beta1``; lucid (0.21 to 2.x) shrinks ``m`` by
``1 - momentum_decay`` every step and corrects the bias twice.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

from shardopt.errors import HyperparamsError

VARIANTS = ("torch", "keras", "optax", "lucid")


@dataclass(frozen=True, slots=True)
class Hyperparams:
    """The hyperparameters of one param group, validated as torch.optim.NAdam does.

    Attributes:
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the square root of the second moment.
        weight_decay: Added to the gradient (L2), or subtracted from the parameter when decoupled.
        momentum_decay: psi of the momentum schedule; ``keras`` and ``optax`` have none and ignore
            it.
        decoupled_weight_decay: Decay as in AdamW. ``keras`` and ``optax`` always decay so;
            ``lucid`` never does.
        maximize: Follow the gradient instead of descending it.
        variant: The published NAdam to follow: one of ``VARIANTS``.

    Raises:
        HyperparamsError: A value is out of range; the message names it.
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False
    maximize: bool = False
    variant: str = "torch"

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "momentum_decay"):
            value = as_real(name, getattr(self, name))
            if not 0.0 <= value < math.inf:
                raise HyperparamsError(
                    f"{name} must be a finite number >= 0; got {value}. Pass {name}=0 or more."
                )
            object.__setattr__(self, name, value)
        object.__setattr__(self, "betas", _as_betas(self.betas))
        for name in ("decoupled_weight_decay", "maximize"):
            object.__setattr__(self, name, as_flag(name, getattr(self, name)))
        if self.variant not in VARIANTS:
            raise HyperparamsError(
                f"variant must be one of {', '.join(VARIANTS)}; got {self.variant!r}. "
                "Leave it out for torch's numbers."
            )
        if self.variant == "lucid" and self.decoupled_weight_decay:
            raise HyperparamsError(
                "decoupled_weight_decay must be False with variant='lucid'; got True. "
                "lucid adds weight_decay to the gradient: choose another variant."
            )

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> "Hyperparams":
        """Read the hyperparameters out of a ``param_groups`` entry."""
        values: list[Any] = [group.get(name) for name in HYPERPARAM_NAMES]
        return cls(*values)

    def values(self) -> tuple[object, ...]:
        """Return the values in the order of ``HYPERPARAM_NAMES``."""
        return tuple([getattr(self, name) for name in HYPERPARAM_NAMES])

    @property
    def decays_decoupled(self) -> bool:
        """Whether weight decay shrinks the parameter rather than entering its gradient."""
        return self.variant in ("keras", "optax") or self.decoupled_weight_decay

    def mu(self, t: int) -> float:
        """Return the momentum of step ``t``, counted from 1."""
        beta1 = self.betas[0]
        if self.variant == "optax":
            return beta1
        psi = 1.0 if self.variant == "keras" else self.momentum_decay
        return float(beta1 * (1.0 - 0.5 * 0.96 ** (t * psi)))


HYPERPARAM_NAMES = tuple(field.name for field in fields(Hyperparams))


@dataclass(frozen=True, slots=True)
class StepCount:
    """The number of steps that a parameter has taken, and the product of their momenta.

    Attributes:
        step: The number of steps.
        mu_product: The product of ``mu(1) ... mu(step)``.
    """

    step: int = 0
    mu_product: float = 1.0

    def after_step(self, hyper: Hyperparams) -> "StepCount":
        """Return the count after one more step, taken with ``hyper``."""
        step = self.step + 1
        return StepCount(step, self.mu_product * hyper.mu(step))


@lru_cache  # most parameters of a group have the same step
def mu_product_at(step: float, hyper: Hyperparams) -> float:
    """Return ``mu_product`` after ``step`` steps, all of them taken with ``hyper``."""
    count, before = StepCount(), None
    while count.step < step and count.mu_product != before:  # it ends at 0 or a denormal number
        before = count.mu_product
        count = count.after_step(hyper)
    return count.mu_product


class StepCoefficients(NamedTuple):
    """The scalars of one update, in the order in which kernels index them.

    See [Note: one formula, four schedules].
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


def step_coefficients(
    hyper: Hyperparams, count: StepCount, grad_scale: float, mean_scale: float = 1.0
) -> StepCoefficients:
    """Compute the coefficients of one step.

    Args:
        hyper: The group's hyperparameters in this step.
        count: The count after this step: ``count.step`` is its number, from 1.
        grad_scale: Factor on the averaged gradient: 1 / loss_scale, times clipping.
        mean_scale: Factor that makes it of the sum of sources.
    """
    beta1, beta2 = hyper.betas
    bias_correction2 = 1.0 - beta2**count.step
    if hyper.variant == "lucid":
        bias_correction1 = 1.0 - beta1**count.step
        rate = hyper.lr * math.sqrt(bias_correction2) / bias_correction1**2
        m_decay = beta1 * (1.0 - hyper.momentum_decay)
        g_scale = rate * (1.0 - beta1)
        m_scale = rate * beta1
    else:
        mu, mu_next = hyper.mu(count.step), hyper.mu(count.step + 1)
        m_decay = beta1
        g_scale = hyper.lr * (1.0 - mu) / (1.0 - count.mu_product)
        m_scale = hyper.lr * mu_next / (1.0 - count.mu_product * mu_next)
    decoupled = hyper.decays_decoupled
    return StepCoefficients(
        source_scale=-grad_scale if hyper.maximize else grad_scale,
        weight_decay=0.0 if decoupled else hyper.weight_decay,
        param_decay=hyper.lr * hyper.weight_decay if decoupled else 0.0,
        m_decay=m_decay,
        m_gain=1.0 - beta1,
        beta2=beta2,
        v_gain=1.0 - beta2,
        g_scale=g_scale,
        m_scale=m_scale,
        v_scale=1.0 / bias_correction2,
        eps=hyper.eps,
        mean_scale=mean_scale,
    )


def as_real(name: str, value: object) -> float:
    """Return a number, or an array or tensor of one element, as a float.

    Raises:
        HyperparamsError: It is not a real number.
    """
    with suppress(OverflowError, RuntimeError, TypeError, ValueError):  # tensors raise the second
        if not isinstance(value, str):  # float() would parse it
            return float(_item(value))
    raise HyperparamsError(f"{name} must be a real number; got {value!r}. Pass a float.")


def as_flag(name: str, value: object) -> bool:
    """Return a bool, or what counts as one, as a bool.

    Raises:
        HyperparamsError: It is text, or has no truth value.
    """
    with suppress(RuntimeError, TypeError, ValueError):
        if not isinstance(value, str):  # any text, even "false", counts as true
            return bool(_item(value))
    raise HyperparamsError(f"{name} must be True or False; got {value!r}. Pass a bool.")


def _item(value: Any) -> Any:
    """Return the element of an array or tensor, even of one with a graph, and all else as is."""
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def _as_betas(betas: object) -> tuple[float, float]:
    try:
        first, second = iter(betas)  # type: ignore[call-overload]  # anything with two items
    except (TypeError, ValueError):
        raise HyperparamsError(
            f"betas must be two numbers; got {betas!r}. Pass for example (0.9, 0.999)."
        ) from None
    pair = as_real("betas[0]", first), as_real("betas[1]", second)
    for index, beta in enumerate(pair):
        if not 0.0 <= beta < 1.0:
            raise HyperparamsError(
                f"betas[{index}] must lie in [0, 1); got {beta}. Pass for example (0.9, 0.999)."
            )
    return pair
