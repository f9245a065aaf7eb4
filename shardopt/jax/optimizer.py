"""The optimizers for JAX: pytrees in, new arrays out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from shardopt.comm.consensus import Outcome, attempt
from shardopt.core.front_end import ArrayFrontEnd
from shardopt.core.optimizer import Optimizer
from shardopt.jax.adapter import flatten_like, make_adapter, make_leaves, require_untraced
from shardopt.jax.arrays import aligned_copy
from shardopt.params.groups import defaults_of, make_groups
from shardopt.policy import ShardPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi4py import MPI

    from shardopt._typing import FloatArray
    from shardopt.jax.adapter import Leaf
    from shardopt.params.groups import Group
    from shardopt.rule.hyperparams import Rule

__all__ = ["Inputs", "ShardedOptimizer", "raise_on_all"]


class Inputs(NamedTuple):
    """The arguments of a step, flat.

    Attributes:
        grads: For each parameter its gradient, or None.
        data: For each parameter its value before the step, or None if it has not changed.
    """

    grads: list[FloatArray | None]
    data: list[FloatArray | None]


class ShardedOptimizer(ArrayFrontEnd):
    """An optimizer of pytrees; ``NAdam`` describes what all have in common."""

    def _set_up(self, arguments: Mapping[str, Any]) -> None:
        defaults = defaults_of(self.rule, arguments)
        tree, error = attempt(make_leaves, arguments["params"])
        groups: Outcome[list[Group]] = Outcome(None, error)
        if tree is not None:
            self._leaves, self._structure = tree
            groups = attempt(make_groups, self._leaves, defaults)
        self._start(groups, make_adapter(arguments["policy"]), defaults, arguments)

    @property
    def params(self) -> Any:
        """The current values, as a pytree of new arrays."""
        copies = [aligned_copy(leaf.data) for leaf in self._leaves]
        arrays = jax.device_put(copies, [leaf.placement for leaf in self._leaves])
        return jax.tree_util.tree_unflatten(self._structure, arrays)

    @property
    def count(self) -> int:
        """The number of steps taken, including those of a loaded state."""
        return max((count.step for count in self.core.step_counts), default=0)

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
                parameters, or holds an array of another shape or dtype, or the call is traced.
            HyperparamsError: A hyperparameter in ``param_groups`` is out of range.
            RankMismatchError: Ranks have different hyperparameters or make different calls.
            RankFailureError: A rank stopped responding for ``policy.timeout_s`` seconds.
        """
        self.advance(
            attempt(self.read, self._structure, grads, params),
            loss_scale=loss_scale,
            overflowed=overflowed,
        )
        return self.params

    @property
    def leaves(self) -> Sequence[Leaf]:
        """The parameters, in the order of the flattened tree."""
        return self._leaves

    def read(self, structure: Any, grads: Any, params: Any) -> Inputs:
        """Check the arguments of ``step``; nothing changes.

        Args:
            structure: The structure that the trees must have, with as many leaves as the
                optimizer's.
            grads: See ``step``.
            params: Likewise.

        Raises:
            PartitionError: They do not fit, or the call is traced.
        """
        inputs = Inputs(
            flatten_like(structure, self._leaves, "grad", grads),
            [None] * len(self._leaves)
            if params is None
            else flatten_like(structure, self._leaves, "data", params),
        )
        require_untraced()
        return inputs

    def advance(self, inputs: Outcome[Inputs], *, loss_scale: Any, overflowed: Any) -> None:
        """Take a step.

        Collective: every rank.

        Args:
            inputs: The gradients and the changed parameters, or an error that all ranks will raise.
            loss_scale: See ``step``, as for the errors.
            overflowed: Likewise.
        """
        self.core.groups.take_over("step()")  # before leaves are lent to the adapter
        views = [leaf.data for leaf in self._leaves]
        if inputs.value is not None:
            for leaf, grad, data in zip(self._leaves, *inputs.value, strict=True):
                leaf.grad = grad
                if data is not None and not _is_same(data, leaf.data):
                    leaf.data = data
        try:
            self.core.step(loss_scale=loss_scale, overflowed=overflowed, error=inputs.error)
        finally:  # a step that raised adopts nothing
            for leaf, view in zip(self._leaves, views, strict=True):
                leaf.data, leaf.grad = view, None
            if self.core.parts.grads.are_averages:  # they are not for the next step
                attempt(self.core.zero_grad)


def raise_on_all(
    error: Exception, rule: Rule, comm: MPI.Intracomm | None, policy: ShardPolicy | None
) -> None:
    """Raise an error of this rank on all ranks, which build an optimizer. Collective."""
    Optimizer(
        Outcome(None, error),
        adapter=make_adapter(policy),
        rule=rule,
        defaults={},
        max_grad_norm=None,
        comm=comm,
        policy=policy or ShardPolicy(),
    )


def _is_same(left: FloatArray, right: FloatArray) -> bool:
    return left.dtype == right.dtype and np.array_equal(left, right)
