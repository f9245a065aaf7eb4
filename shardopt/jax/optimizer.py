"""The optimizer for JAX: pytrees in, new arrays out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from shardopt.comm.consensus import Outcome, attempt
from shardopt.core.front_end import ArrayFrontEnd
from shardopt.core.optimizer import Optimizer
from shardopt.jax.adapter import JaxAdapter, aligned_copy, flatten_like, make_leaves
from shardopt.params.groups import defaults_of, make_groups
from shardopt.policy import ShardPolicy

if TYPE_CHECKING:
    from mpi4py import MPI

    from shardopt._typing import FloatArray
    from shardopt.params.groups import Group

__all__ = ["NAdam"]


class NAdam(ArrayFrontEnd):
    """NAdam as torch.optim.NAdam computes it, sharded over MPI ranks; pytrees in and out.

    Arrays that are handed out never change: every step makes new ones, which is a copy on each rank
    besides the node's own in shared memory. They are put on the devices where the initial ones
    were. Parameters are named by their paths in the tree and form one param group.

    Steps run on the host, outside of ``jax.jit``: compile what computes the gradients.

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
        defaults = defaults_of(locals())
        tree, error = attempt(make_leaves, params)
        groups: Outcome[list[Group]] = Outcome(None, error)
        if tree is not None:
            self._leaves, self._structure = tree
            groups = attempt(make_groups, self._leaves, defaults)
        self.core = Optimizer(
            groups,
            adapter=JaxAdapter(),
            defaults=defaults,
            max_grad_norm=max_grad_norm,
            comm=comm,
            policy=policy or ShardPolicy(),
        )

    @property
    def params(self) -> Any:
        """The current values, as a pytree of new arrays."""
        copies = [aligned_copy(leaf.data) for leaf in self._leaves]
        arrays = jax.device_put(copies, [leaf.placement for leaf in self._leaves])
        return jax.tree_util.tree_unflatten(self._structure, arrays)

    @property
    def count(self) -> int:
        """The number of steps taken, including those of a loaded state."""
        return max(count.step for count in self.core.step_counts)

    def step(
        self,
        grads: Any,
        params: Any = None,
        *,
        loss_scale: float = 1.0,
        overflowed: bool = False,
    ) -> Any:
        """Average the gradients over ranks and update the parameters.

        Collective: every rank.

        Args:
            grads: This rank's gradients, a pytree like the parameters, in their shapes and dtypes.
                None in the place of a leaf means that this rank has no gradient for it. A parameter
                without a gradient on every rank stays as it is.
            params: The parameters before the step, if you changed them since they were returned;
                if several ranks change the same one, the lowest rank's value wins. None, for all or
                in the place of a leaf, means that they are unchanged.
            loss_scale: See ``core.Optimizer.step``.
            overflowed: See ``core.Optimizer.step``.

        Returns:
            The new parameters, like the property ``params``.

        Raises:
            PartitionError: ``grads`` or ``params`` has another structure than the optimizer's
                parameters, or holds an array of another shape or dtype, or a tracer.
            HyperparamsError: A hyperparameter in ``param_groups`` is out of range.
            RankMismatchError: Ranks have different hyperparameters or make different calls.
            RankFailureError: A rank stopped responding for ``policy.timeout_s`` seconds.
        """
        views = [leaf.data for leaf in self._leaves]
        _, error = attempt(self._take, grads, params)
        try:
            self.core.step(loss_scale=loss_scale, overflowed=overflowed, error=error)
        finally:  # a step that raised adopts nothing
            for leaf, view in zip(self._leaves, views, strict=True):
                leaf.data, leaf.grad = view, None
        return self.params

    def _take(self, grads: Any, params: Any) -> None:
        """Put the arguments of ``step`` where the adapter finds them."""
        new_grads = flatten_like(self._structure, self._leaves, "grad", grads)
        new_data: list[FloatArray | None] = [None] * len(self._leaves)
        if params is not None:
            new_data = flatten_like(self._structure, self._leaves, "data", params)
        for leaf, grad, data in zip(self._leaves, new_grads, new_data, strict=True):
            leaf.grad = grad
            if data is not None and not _is_same(data, leaf.data):
                leaf.data = data


# The optimizer is not data: for tree_map, and as the state of optax, it has no leaves.
jax.tree_util.register_pytree_node(NAdam, lambda opt: ((), opt), lambda opt, _: opt)


def _is_same(left: FloatArray, right: FloatArray) -> bool:
    return left.dtype == right.dtype and np.array_equal(left, right)
