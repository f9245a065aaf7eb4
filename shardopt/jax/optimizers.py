"""The optimizers with torch's arguments that users import from shardopt.jax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardopt.jax.optimizer import ShardedOptimizer
from shardopt.rule import adam, nadam, radam

if TYPE_CHECKING:
    from mpi4py import MPI

    from shardopt.policy import ShardPolicy

__all__ = ["Adam", "AdamW", "NAdam", "RAdam"]


class NAdam(ShardedOptimizer):
    """NAdam as torch.optim.NAdam computes it, sharded over MPI ranks; pytrees in and out.

    Arrays that are handed out never change: every step makes new ones, which is a copy on each rank
    besides the node's own in shared memory. They are put on the devices where the initial ones
    were. Parameters are named by their paths in the tree and form one param group, from which they
    may be moved to others.

    Steps run on the host, outside of ``jax.jit``: compile what computes the gradients. Gradients on
    a GPU are copied to the host for that, and the new parameters back.

    Collective: construction and most methods; see ``core.Optimizer`` for those and for the errors.

    Args:
        params: Pytree of arrays, [any shape] each, in float16, bfloat16, float32 or, with
            ``jax_enable_x64``, float64; rank 0's values win. It is left unchanged.
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

    Example:
        >>> with NAdam(params, lr=0.1) as opt:
        ...     params = opt.params
        ...     for batch in batches:
        ...         params = opt.step(grad_of_loss(params, batch))
    """

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
        super().__init__(locals())


class Adam(ShardedOptimizer):
    """Adam as torch.optim.Adam computes it, sharded over MPI ranks; pytrees in and out.

    All that ``NAdam`` says of pytrees, calls and errors holds here, too.

    Args:
        params: See ``NAdam``, as for all that is not named here.
        weight_decay: Added to the gradient, or subtracted from the parameter when decoupled.
        amsgrad: Must be False: there is no third moment.
        decoupled_weight_decay: Decay weights as AdamW does.
        variant: The Adam to follow: ``torch``, ``keras``, ``optax`` or ``lucid``, of which
            ``keras`` and ``lucid`` add ``eps`` before the bias correction.
    """

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
        super().__init__(locals())


class AdamW(ShardedOptimizer):
    """AdamW as torch.optim.AdamW computes it, sharded over MPI ranks; pytrees in and out.

    All that ``NAdam`` says of pytrees, calls and errors holds here, too.

    Args:
        params: See ``NAdam``, as for all that is not named here.
        weight_decay: Subtracted from the parameter, times ``lr``.
        amsgrad: Must be False: there is no third moment.
        variant: See ``Adam``.
    """

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
        super().__init__(locals())


class RAdam(ShardedOptimizer):
    """RAdam as torch.optim.RAdam computes it, sharded over MPI ranks; pytrees in and out.

    All that ``NAdam`` says of pytrees, calls and errors holds here, too.

    Args:
        params: See ``NAdam``, as for all that is not named here.
        variant: The RAdam to follow: ``torch``, ``optax`` or ``lucid``.
    """

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
        super().__init__(locals())
