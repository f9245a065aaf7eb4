"""NAdam: Adam with Nesterov momentum, in four published forms.

Sources: T. Dozat, "Incorporating Nesterov momentum into Adam", 2016, with the schedule
``mu(t) = beta1 * (1 - 0.5 * 0.96**(t * momentum_decay))`` as in torch.optim.NAdam; Keras fixes
``momentum_decay`` at 1; optax.nadam keeps ``mu(t) = beta1``; lucid (0.21 to 2.x) shrinks ``m`` by
``1 - momentum_decay`` every step and corrects the bias twice.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from shardopt.errors import HyperparamsError
from shardopt.rule.coefficients import StepCount
from shardopt.rule.hyperparams import Hyperparams, Terms


@dataclass(frozen=True, slots=True)
class NAdam(Hyperparams):
    """The hyperparameters of NAdam, validated as torch.optim.NAdam does.

    Attributes:
        momentum_decay: psi of the momentum schedule; ``keras`` and ``optax`` have none and ignore
            it.
        decoupled_weight_decay: As in ``Hyperparams``; ``lucid`` never decays so.
    """

    name: ClassVar[str] = "NAdam"
    count_keys: ClassVar[tuple[str, ...]] = ("step", "mu_product")
    variants: ClassVar[tuple[str, ...]] = ("torch", "keras", "optax", "lucid")
    _reals: ClassVar[tuple[str, ...]] = ("lr", "eps", "weight_decay", "momentum_decay")

    lr: float = 2e-3
    momentum_decay: float = 4e-3

    def _check(self) -> None:
        if self.variant == "lucid" and self.decoupled_weight_decay:
            raise HyperparamsError(
                "decoupled_weight_decay must be False with variant='lucid'; got True. "
                "lucid adds weight_decay to the gradient: choose another variant."
            )

    def mu(self, t: int) -> float:
        """Return the momentum of step ``t``, counted from 1."""
        beta1 = self.betas[0]
        if self.variant == "optax":
            return beta1
        psi = 1.0 if self.variant == "keras" else self.momentum_decay
        return float(beta1 * (1.0 - 0.5 * 0.96 ** (t * psi)))

    def after_step(self, count: StepCount) -> StepCount:
        """See ``Hyperparams.after_step``."""
        step = count.step + 1
        return StepCount(step, count.mu_product * self.mu(step))

    def count_at(self, step: int) -> StepCount:
        """See ``Hyperparams.count_at``."""
        return StepCount(step, mu_product_at(step, self))

    def terms(self, count: StepCount) -> Terms:
        """See ``Hyperparams.terms``."""
        beta1, beta2 = self.betas
        bias_correction2 = 1.0 - beta2**count.step
        v_scale = 1.0 / bias_correction2
        if self.variant == "lucid":
            bias_correction1 = 1.0 - beta1**count.step
            rate = self.lr * math.sqrt(bias_correction2) / bias_correction1**2
            m_decay = beta1 * (1.0 - self.momentum_decay)
            return Terms(m_decay, rate * (1.0 - beta1), rate * beta1, v_scale, self.eps)
        mu, mu_next = self.mu(count.step), self.mu(count.step + 1)
        return Terms(
            m_decay=beta1,
            g_scale=self.lr * (1.0 - mu) / (1.0 - count.mu_product),
            m_scale=self.lr * mu_next / (1.0 - count.mu_product * mu_next),
            v_scale=v_scale,
            eps=self.eps,
        )


@lru_cache  # most parameters of a group have the same step
def mu_product_at(step: float, hyper: NAdam) -> float:
    """Return ``mu_product`` after ``step`` steps, all of them taken with ``hyper``."""
    count, before = StepCount(), None
    while count.step < step and count.mu_product != before:  # it ends at 0 or a denormal number
        before = count.mu_product
        count = hyper.after_step(count)
    return count.mu_product
