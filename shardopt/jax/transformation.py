"""The sharded NAdam behind optax's interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from jax import numpy as jnp

from shardopt.jax.optimizer import NAdam
from shardopt.layout.dtypes import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["nadam"]


def nadam(lr: float | Callable[[int], Any] = 2e-3, **settings: Any) -> Any:
    """Return ``NAdam`` as an ``optax.GradientTransformation``.

    ``init(params)`` builds the optimizer, which is the state; call its ``close()`` at the end.
    ``update(grads, opt, params)`` takes a step and returns the new parameters minus the old ones.
    ``optax.apply_updates`` turns that into the new parameters, up to one rounding of the difference
    and one of the sum. For 16-bit parameters the differences are float32, so that nothing is
    rounded. Passed parameters that differ from the optimizer's, if only by such a rounding, replace
    them, which costs a copy: ``NAdam`` itself is faster.

    Limits: ``init`` and ``update`` are collective and run outside of ``jax.jit``. Transformations
    chained before this one see the gradients of this rank, which are not averaged yet.

    Args:
        lr: Learning rate, or an optax schedule: a function of the number of steps taken.
        **settings: Passed on to ``NAdam``.

    Raises:
        ImportError: optax is not installed.
    """
    try:
        import optax  # here, because only this function needs it
    except ImportError as error:
        raise ImportError(
            "optax must be installed for shardopt.jax.nadam; got none. Run pip install optax, or "
            "use shardopt.jax.NAdam."
        ) from error

    def lr_at(count: int) -> float:
        # Under jax.jit lr would be a tracer; step() reports that mistake better.
        with jax.ensure_compile_time_eval():
            return float(lr(count)) if callable(lr) else lr

    def init(params: Any) -> NAdam:
        return NAdam(params, lr_at(0), **settings)

    def update(grads: Any, opt: NAdam, params: Any = None) -> tuple[Any, NAdam]:
        if callable(lr):
            opt.param_groups[0]["lr"] = lr_at(opt.count)
        old = opt.params if params is None else params
        return jax.tree_util.tree_map(_difference, opt.step(grads, params), old), opt

    return optax.GradientTransformation(init, update)


def _difference(new: Any, old: Any) -> Any:
    """Return ``new - old`` in at least float32; ``optax.apply_updates`` rounds the sum."""
    dtype = compute_dtype(new.dtype.name)
    return new.astype(dtype) - jnp.asarray(old, dtype)
