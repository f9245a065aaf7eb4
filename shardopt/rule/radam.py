"""RAdam: Adam that leaves the second moment out while there are too few gradients to know it.

[Note: rectification]
With ``rho_inf = 2 / (1 - beta2) - 1`` and ``rho(t) = rho_inf - 2 t beta2**t / (1 - beta2**t)``, the
update is Adam's times ``r = sqrt((rho-4) (rho-2) rho_inf / ((rho_inf-4) (rho_inf-2) rho))`` where
``rho`` is large enough, and ``lr * m / (1 - beta1**t)`` where it is not: ``v_scale`` is 0 then and
``eps`` is 1, so that the update is divided by 1.

Sources: L. Liu et al., "On the variance of the adaptive learning rate and beyond", 2020. It wants
``rho > 4``. torch.optim.RAdam wants ``rho > 5`` and adds ``eps`` before the bias correction;
optax.radam wants ``rho >= 5`` and adds it after; lucid (0.21 to 2.x) wants ``rho > 4``, adds it
after, and leaves the last ``rho`` of ``r`` out, so that steps become ``sqrt(rho)`` times as long.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from shardopt.rule.coefficients import StepCount
from shardopt.rule.hyperparams import Hyperparams, Terms


@dataclass(frozen=True, slots=True)
class RAdam(Hyperparams):
    """The hyperparameters of RAdam."""

    name: ClassVar[str] = "RAdam"
    variants: ClassVar[tuple[str, ...]] = ("torch", "optax", "lucid")

    def terms(self, count: StepCount) -> Terms:
        """See ``Hyperparams.terms``, and [Note: rectification]."""
        beta1, beta2 = self.betas
        bias_correction2 = 1.0 - beta2**count.step
        rate = self.lr / (1.0 - beta1**count.step)
        rho_inf = 2.0 / (1.0 - beta2) - 1.0
        rho = rho_inf - 2.0 * count.step * beta2**count.step / bias_correction2
        is_known = {"torch": rho > 5.0, "optax": rho >= 5.0, "lucid": rho > 4.0}
        if not is_known[self.variant]:
            return Terms(m_decay=beta1, g_scale=0.0, m_scale=rate, v_scale=0.0, eps=1.0)
        square = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0))
        rectification = math.sqrt(square if self.variant == "lucid" else square / rho)
        adds_eps_first = self.variant == "torch"
        return Terms(
            m_decay=beta1,
            g_scale=0.0,
            m_scale=rate * rectification,
            v_scale=1.0 / bias_correction2,
            eps=self.eps / math.sqrt(bias_correction2) if adds_eps_first else self.eps,
        )
