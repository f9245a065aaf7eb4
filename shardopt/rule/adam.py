"""Adam and AdamW.

Sources: D. Kingma and J. Ba, "Adam: a method for stochastic optimization", 2015, and I. Loshchilov
and F. Hutter, "Decoupled weight decay regularization", 2019. torch.optim and optax add ``eps``
after the bias correction, as the algorithm of the paper does; Keras and lucid before it, as its
section 2 does.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from shardopt.errors import HyperparamsError
from shardopt.rule.coefficients import StepCount
from shardopt.rule.hyperparams import Hyperparams, Terms


@dataclass(frozen=True, slots=True)
class Adam(Hyperparams):
    """The hyperparameters of Adam.

    Attributes:
        amsgrad: Must be False: it takes a third moment.
    """

    name: ClassVar[str] = "Adam"
    variants: ClassVar[tuple[str, ...]] = ("torch", "keras", "optax", "lucid")

    amsgrad: bool = False

    def _check(self) -> None:
        if self.amsgrad:
            raise HyperparamsError(
                "amsgrad must be False; got True. It keeps a maximum of exp_avg_sq, for which "
                "there is no memory here: leave it out, or use the framework's own optimizer."
            )

    def terms(self, count: StepCount) -> Terms:
        """See ``Hyperparams.terms``."""
        beta1, beta2 = self.betas
        bias_correction2 = 1.0 - beta2**count.step
        adds_eps_first = self.variant in ("keras", "lucid")
        return Terms(
            m_decay=beta1,
            g_scale=0.0,
            m_scale=self.lr / (1.0 - beta1**count.step),
            v_scale=1.0 / bias_correction2,
            eps=self.eps / math.sqrt(bias_correction2) if adds_eps_first else self.eps,
        )


@dataclass(frozen=True, slots=True)
class AdamW(Adam):
    """The hyperparameters of AdamW: Adam's, with decoupled weight decay always.

    Attributes:
        decoupled_weight_decay: Must be True.
    """

    name: ClassVar[str] = "AdamW"

    weight_decay: float = 1e-2
    decoupled_weight_decay: bool = True

    def _check(self) -> None:
        Adam._check(self)
        if not self.decoupled_weight_decay:
            raise HyperparamsError(
                "decoupled_weight_decay must be True in AdamW; got False. Use Adam to add "
                "weight_decay to the gradient."
            )
