"""The optimizers that users import from shardopt.torch: a rule and torch's signature each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardopt.rule import adam, nadam, radam
from shardopt.torch.optimizer import ShardedOptimizer

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch import Tensor

    from shardopt.policy import ShardPolicy

__all__ = ["Adam", "AdamW", "NAdam", "RAdam"]


class NAdam(ShardedOptimizer):
    """torch.optim.NAdam, sharded over MPI ranks.

    Every rank builds the same model and computes gradients of its own batch; ``step`` averages
    them over the ranks and updates the parameters. Rank 0's initial parameters win. Learning rate
    schedulers, ``torch.amp.GradScaler``, optimizer hooks and ``param_groups`` work as they do with
    any torch optimizer.

    ``p.data`` becomes this rank's own view of weights of which the node has one copy. Write to it
    as you would in DDP, alike on all ranks: the next step adopts what was written. ``p.grad``
    becomes a view of this rank's own memory, into which autograd accumulates. After ``zero_grad()``
    it is zero instead of None; a parameter that no backward has reached since still counts as one
    without a gradient. The moments are sharded over the ranks, but each rank of a node addresses
    all of them: ``state`` and ``state_dict`` are as torch's.

    With ``ShardPolicy(stage=2)`` on one node, ``p.grad`` is the average over all ranks after
    backward, in float32 for parameters of 16 bits, and None after ``zero_grad()``. On several nodes
    it raises when it is used, unless ``average_grads`` has come before; see
    [Note: what p.grad is in stage 2].

    Parameters in bfloat16 or float16 have a float32 master in the shard of their owner, and their
    moments are float32; ``ShardPolicy(master_weights=False, optim_bits=8)`` does with less. Complex
    parameters are pairs of reals, as in torch.

    Collective: construction, ``step``, ``average_grads``, ``add_param_group``, ``load_state_dict``,
    ``gather_state_dict`` and ``close``. If one rank raises, all ranks raise.

    Args:
        params: A module, tensors, (name, tensor) pairs, or dicts with ``params`` and
            hyperparameters. A module, its ``parameters()`` and pairs give parameters the names that
            messages and checkpoints show. With ``optim_bits=8`` in the policy, the embeddings of a
            module keep moments in float32.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay of the first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Added to the gradient, or subtracted from the parameter when decoupled.
        momentum_decay: psi of the momentum schedule.
        decoupled_weight_decay: Decay weights as AdamW does.
        foreach: Accepted for compatibility with torch, and ignored: the step is one fused pass.
        maximize: Follow the gradient instead of descending it.
        capturable: Must be False.
        differentiable: Must be False.
        variant: The NAdam to follow: ``torch``, ``keras``, ``optax`` or ``lucid``.
        max_grad_norm: Clip the global norm of the averaged gradient to this. Use it instead of
            ``clip_grad_norm_``, which would only see this rank's gradient, unless
            ``average_grads`` comes before.
        comm: The ranks that train together; None is COMM_WORLD.
        policy: How to shard.

    Raises:
        TypeError: As torch.optim.Optimizer raises it.
        ValueError: As torch.optim.Optimizer raises it; ``PartitionError`` and ``HyperparamsError``
            are ValueErrors too.
        RankMismatchError: Ranks were given different models or settings.
        SharedMemoryError: The memory of a node cannot be had.
        LauncherError: The job was started with another MPI's launcher.
    """

    rule = nadam.NAdam

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        variant: str = "torch",
        max_grad_norm: float | None = None,
        comm: MPI.Intracomm | None = None,
        policy: ShardPolicy | None = None,
    ) -> None:
        super().__init__(locals())


class Adam(ShardedOptimizer):
    """torch.optim.Adam, sharded over MPI ranks.

    All that ``NAdam`` says of parameters, gradients, calls and errors holds here, too.

    Args:
        params: See ``NAdam``, as for all that is not named here.
        weight_decay: Added to the gradient, or subtracted from the parameter when decoupled.
        amsgrad: Must be False: there is no third moment.
        fused: Accepted for compatibility with torch, and ignored, as ``foreach`` is.
        decoupled_weight_decay: Decay weights as AdamW does.
        variant: The Adam to follow: ``torch``, ``keras``, ``optax`` or ``lucid``, of which
            ``keras`` and ``lucid`` add ``eps`` before the bias correction.
    """

    rule = adam.Adam

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        variant: str = "torch",
        max_grad_norm: float | None = None,
        comm: MPI.Intracomm | None = None,
        policy: ShardPolicy | None = None,
    ) -> None:
        super().__init__(locals())


class AdamW(ShardedOptimizer):
    """torch.optim.AdamW, sharded over MPI ranks.

    All that ``NAdam`` says of parameters, gradients, calls and errors holds here, too.

    Args:
        params: See ``NAdam``, as for all that is not named here.
        weight_decay: Subtracted from the parameter, times ``lr``.
        amsgrad: Must be False: there is no third moment.
        fused: Accepted for compatibility with torch, and ignored, as ``foreach`` is.
        variant: See ``Adam``.
    """

    rule = adam.AdamW

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        variant: str = "torch",
        max_grad_norm: float | None = None,
        comm: MPI.Intracomm | None = None,
        policy: ShardPolicy | None = None,
    ) -> None:
        super().__init__(locals())


class RAdam(ShardedOptimizer):
    """torch.optim.RAdam, sharded over MPI ranks.

    All that ``NAdam`` says of parameters, gradients, calls and errors holds here, too.

    Args:
        params: See ``NAdam``, as for all that is not named here.
        variant: The RAdam to follow: ``torch``, ``optax`` or ``lucid``.
    """

    rule = radam.RAdam

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        variant: str = "torch",
        max_grad_norm: float | None = None,
        comm: MPI.Intracomm | None = None,
        policy: ShardPolicy | None = None,
    ) -> None:
        super().__init__(locals())
