"""The optimizers with torch's arguments that users import from shardopt.jax."""

from __future__ import annotations

from shardopt.core import signatures
from shardopt.jax.optimizer import ShardedOptimizer

__all__ = ["Adam", "AdamW", "NAdam", "RAdam"]


class NAdam(signatures.NAdam, ShardedOptimizer):
    """NAdam as torch.optim.NAdam computes it, sharded over MPI ranks; pytrees in and out.

    ``params`` is a pytree of arrays, [any shape] each, in float16, bfloat16, float32 or, with
    ``jax_enable_x64``, float64. It is left unchanged, and rank 0's values win. Parameters are named
    by their paths in the tree and form one param group, from which they may be moved to others.

    Arrays that are handed out never change: every step makes new ones, which is a copy on each rank
    besides the node's own in shared memory. They are put on the devices where the initial ones
    were.

    Steps run on the host, outside of ``jax.jit``: compile what computes the gradients. Gradients on
    a GPU are copied to the host for that, and the new parameters back.

    Collective: construction and most methods; see ``core.Optimizer`` for those and for the errors.

    Example:
        >>> with NAdam(params, lr=0.1) as opt:
        ...     params = opt.params
        ...     for batch in batches:
        ...         params = opt.step(grad_of_loss(params, batch))
    """


class Adam(signatures.Adam, ShardedOptimizer):
    """Adam as torch.optim.Adam computes it, sharded over MPI ranks; see ``NAdam`` for pytrees."""


class AdamW(signatures.AdamW, ShardedOptimizer):
    """AdamW as torch.optim.AdamW computes it, sharded over MPI ranks; see ``NAdam`` for pytrees."""


class RAdam(signatures.RAdam, ShardedOptimizer):
    """RAdam as torch.optim.RAdam computes it, sharded over MPI ranks; see ``NAdam`` for pytrees."""
