"""The optimizers as optax transformations, which users import from shardopt.jax."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from shardopt.jax import optimizers
from shardopt.jax.transformation import make_transformation

if TYPE_CHECKING:
    from mpi4py import MPI

    from shardopt.policy import ShardPolicy

__all__ = ["adam", "adamw", "nadam", "radam"]

LearningRate: TypeAlias = float | Callable[[int], Any] | None


def nadam(
    lr: LearningRate = None,
    b1: float | None = None,
    b2: float | None = None,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    *,
    learning_rate: LearningRate = None,
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    variant: str = "torch",
    maximize: bool = False,
    max_grad_norm: float | None = None,
    keep_states: bool = False,
    comm: MPI.Intracomm | None = None,
    policy: ShardPolicy | None = None,
) -> Any:
    """Return ``NAdam`` as an ``optax.GradientTransformationExtraArgs``.

    ``init(params)`` builds the optimizer, and ``update(grads, state, params)`` takes a step with it
    and returns the new parameters minus the old ones. ``optax.apply_updates`` turns that into the
    new parameters, up to one rounding of the difference and one of the sum. For 16-bit parameters
    the differences are float32, so that nothing is rounded. Passed parameters that differ from the
    optimizer's, if only by such a rounding, replace them, which costs a copy: ``NAdam`` itself is
    faster. ``update`` takes ``loss_scale`` and ``overflowed`` as ``NAdam.step`` does; other extra
    arguments are for other transformations.

    The state, a ``NAdamState``, is a pytree with the leaves ``step``, ``mu_product``, ``exp_avg``,
    ``exp_avg_sq`` and ``master``, copied when they are asked for. What was made of its leaves, by
    ``jax.tree.map`` or from a checkpoint, may be passed to ``update`` at any time and is loaded. A
    state itself, however, must not be used again after the update that follows it, which
    overwrites its moments: it raises. On several nodes leaves have no moments, and only the present
    state is accepted. ``state.optimizer`` is the ``NAdam``; call ``state.close()`` at the end.

    Limits: ``init`` and ``update`` are collective and run outside of ``jax.jit`` and ``lax.cond``,
    which ``optax.apply_if_finite`` and ``optax.MultiSteps`` use: traced calls raise on all ranks.
    Transformations chained before this one see the gradients of this rank, which are not averaged
    yet: ``clip_by_global_norm`` there would clip each rank's own; use ``max_grad_norm``.

    Args:
        lr: Learning rate, or an optax schedule: a function of the number of steps taken. None is
            2e-3.
        b1: Decay of the first moment; None is 0.9.
        b2: Decay of the second moment; None is 0.999.
        eps: Added to the square root of the second moment.
        eps_root: Must be 0; see ``eps``.
        mu_dtype: Must be None: moments are float32, or float64 for such parameters.
        learning_rate: Another name of ``lr``.
        betas: ``b1`` and ``b2``.
        weight_decay: See ``NAdam``, as for the arguments after it.
        momentum_decay: Likewise.
        decoupled_weight_decay: Likewise.
        variant: Likewise; ``optax`` is optax's.
        maximize: Likewise.
        max_grad_norm: Likewise.
        keep_states: Copy the moments in every update, on every rank, so that any state may be used
            again; on one node only.
        comm: See ``NAdam``.
        policy: Likewise.

    Raises:
        ImportError: optax is not installed.
        HyperparamsError: ``init`` and ``update`` raise it on all ranks if arguments contradict one
            another, are out of range or are not supported.
    """
    return make_transformation(optimizers.NAdam, locals())


def adam(
    lr: LearningRate = None,
    b1: float | None = None,
    b2: float | None = None,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    *,
    learning_rate: LearningRate = None,
    betas: tuple[float, float] | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    variant: str = "torch",
    maximize: bool = False,
    max_grad_norm: float | None = None,
    keep_states: bool = False,
    comm: MPI.Intracomm | None = None,
    policy: ShardPolicy | None = None,
) -> Any:
    """Return ``Adam`` as an ``optax.GradientTransformationExtraArgs``.

    The arguments are those of ``optax.adam``, and ours. All that ``nadam`` says of states, updates
    and errors holds here, too.

    Args:
        lr: See ``nadam``, as for all that is not named here; None is 1e-3.
        nesterov: Must be False; see ``nadam``.
        variant: The Adam to follow; those of torch and optax are the same.
    """
    return make_transformation(optimizers.Adam, locals())


def adamw(
    lr: LearningRate = None,
    b1: float | None = None,
    b2: float | None = None,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    learning_rate: LearningRate = None,
    betas: tuple[float, float] | None = None,
    nesterov: bool = False,
    variant: str = "torch",
    maximize: bool = False,
    max_grad_norm: float | None = None,
    keep_states: bool = False,
    comm: MPI.Intracomm | None = None,
    policy: ShardPolicy | None = None,
) -> Any:
    """Return ``AdamW`` as an ``optax.GradientTransformationExtraArgs``.

    The arguments are those of ``optax.adamw``, and ours. All that ``nadam`` says of states, updates
    and errors holds here, too.

    Args:
        lr: See ``nadam``, as for all that is not named here; None is 1e-3.
        weight_decay: Subtracted from the parameter, times the learning rate.
        mask: Must be None; see ``ShardedOptimizer.param_groups`` for parameters without decay.
        nesterov: Must be False; see ``nadam``.
        variant: The AdamW to follow; those of torch and optax are the same.
    """
    return make_transformation(optimizers.AdamW, locals())


def radam(
    lr: LearningRate = None,
    b1: float | None = None,
    b2: float | None = None,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    threshold: float = 5.0,
    *,
    learning_rate: LearningRate = None,
    betas: tuple[float, float] | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    variant: str = "optax",
    maximize: bool = False,
    max_grad_norm: float | None = None,
    keep_states: bool = False,
    comm: MPI.Intracomm | None = None,
    policy: ShardPolicy | None = None,
) -> Any:
    """Return ``RAdam`` as an ``optax.GradientTransformationExtraArgs``.

    The arguments are those of ``optax.radam``, and ours. All that ``nadam`` says of states, updates
    and errors holds here, too.

    Args:
        lr: See ``nadam``, as for all that is not named here; None is 1e-3.
        threshold: Must be 5.
        nesterov: Must be False; see ``nadam``.
        variant: The RAdam to follow, optax's if it is left out; see ``RAdam``.
    """
    return make_transformation(optimizers.RAdam, locals())
