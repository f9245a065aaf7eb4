"""The constructors of the optimizers, with the arguments of torch.optim in their order.

``shardopt.numpy``, ``shardopt.jax`` and ``shardopt.lucid`` share them. Those of ``shardopt.torch``
have the arguments that are of no use elsewhere as well, and are declared there; so are the
functions of ``shardopt.jax``, which have optax's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardopt.core.front_end import ArrayFrontEnd
from shardopt.rule import adam, nadam, radam

if TYPE_CHECKING:
    from mpi4py import MPI

    from shardopt.policy import ShardPolicy


class NAdam(ArrayFrontEnd):
    """NAdam; see [Note: one formula]."""

    rule = nadam.NAdam

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        variant: str = "torch",
        maximize: bool = False,
        max_grad_norm: float | None = None,
        comm: MPI.Intracomm | None = None,
        policy: ShardPolicy | None = None,
    ) -> None:
        """Set up the optimizer. Collective: every rank.

        Args:
            params: What to train, in one of the forms that the class names.
            lr: Learning rate.
            betas: Decay of the first and second moment.
            eps: Added to the square root of the second moment.
            weight_decay: Added to the gradient, or subtracted from the parameter when decoupled.
            momentum_decay: psi of the momentum schedule.
            decoupled_weight_decay: Decay weights as AdamW does.
            variant: The NAdam to follow: ``torch``, ``keras``, ``optax`` or ``lucid``.
            maximize: Follow the gradient instead of descending it.
            max_grad_norm: Clip the global norm of the averaged gradient to this.
            comm: The ranks that train together; None is COMM_WORLD.
            policy: How to shard.
        """
        self._set_up(locals())


class Adam(ArrayFrontEnd):
    """Adam; see [Note: one formula]."""

    rule = adam.Adam

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        variant: str = "torch",
        maximize: bool = False,
        max_grad_norm: float | None = None,
        comm: MPI.Intracomm | None = None,
        policy: ShardPolicy | None = None,
    ) -> None:
        """Set up the optimizer. Collective: every rank.

        Args:
            params: See ``NAdam``, as for all that is not named here.
            weight_decay: Added to the gradient, or subtracted from the parameter when decoupled.
            amsgrad: Must be False: there is no third moment.
            decoupled_weight_decay: Decay weights as AdamW does.
            variant: The Adam to follow: ``torch``, ``keras``, ``optax`` or ``lucid``, of which
                ``keras`` and ``lucid`` add ``eps`` before the bias correction.
        """
        self._set_up(locals())


class AdamW(ArrayFrontEnd):
    """AdamW; see [Note: one formula]."""

    rule = adam.AdamW

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        variant: str = "torch",
        maximize: bool = False,
        max_grad_norm: float | None = None,
        comm: MPI.Intracomm | None = None,
        policy: ShardPolicy | None = None,
    ) -> None:
        """Set up the optimizer. Collective: every rank.

        Args:
            params: See ``NAdam``, as for all that is not named here.
            weight_decay: Subtracted from the parameter, times ``lr``.
            amsgrad: Must be False: there is no third moment.
            variant: See ``Adam``.
        """
        self._set_up(locals())


class RAdam(ArrayFrontEnd):
    """RAdam; see [Note: one formula] and [Note: rectification]."""

    rule = radam.RAdam

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        variant: str = "torch",
        maximize: bool = False,
        max_grad_norm: float | None = None,
        comm: MPI.Intracomm | None = None,
        policy: ShardPolicy | None = None,
    ) -> None:
        """Set up the optimizer. Collective: every rank.

        Args:
            params: See ``NAdam``, as for all that is not named here.
            variant: The RAdam to follow: ``torch``, ``optax`` or ``lucid``.
        """
        self._set_up(locals())
