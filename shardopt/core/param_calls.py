"""The calls of an optimizer about the values of its parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardopt.comm.consensus import attempt
from shardopt.core.param_values import parse_values, share_values
from shardopt.core.shared_params import UserChanges
from shardopt.errors import HyperparamsError, PartitionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardopt._typing import FloatArray
    from shardopt.core.optimizer import Optimizer


class ParamCalls:
    """Calls that set parameters on all ranks to other values than a step would.

    Args:
        core: The optimizer.
    """

    def __init__(self, core: Optimizer[Any]) -> None:
        self._core = core

    def load_params(self, values: Mapping[str, Any] | None) -> list[str]:
        """Load values into the parameters, without a copy of the model on each rank.

        The same as writing them into the parameters on every rank, which would give each rank a
        copy of its own until the next step. What was written to parameters before is gone.

        Collective: every rank.

        Args:
            values: For each parameter's name an array of its shape, such as the model's state dict;
                the same on every rank. Ranks that have none pass None and get those of others.

        Returns:
            The names in ``values`` that belong to no parameter, such as those of buffers, and are
            left to you.

        Raises:
            CheckpointError: A value is missing or has another shape. Nothing has changed then.
            RankMismatchError: Ranks have different values. Likewise.
        """
        self._core.groups.take_over("load_params()")
        parts, call, step = self._core.parts, "load_params()", self._core.last_step.step
        parsed, error = attempt(parse_values, values, parts.registry)
        self._core.enter_call(call, {}, error)
        loaded = share_values(parsed, parts.registry, parts.collectives, step)
        self._core.params.load(loaded.arrays, step)
        self._core.last_step = self._core.last_step.without_poison()
        return loaded.others

    def grad(self, param: Any) -> FloatArray | None:
        """Return the gradient of a parameter as this rank sees it, to look at.

        In stage 1 it is this rank's own, or the average over all ranks after ``average_grads()``.
        In stage 2 on one node it is the average, of as many backwards as this rank has run, and the
        call waits for ranks that are behind, as every use of ``p.grad`` does; with lucid it is so
        after ``average_grads()`` or a step, and this rank's own before.

        Not collective: each rank may call it by itself.

        Args:
            param: The parameter.

        Returns:
            An array of its shape and dtype that cannot be written to: a view, which shows what
            becomes of the gradient, or a copy if it is on a device. None if there is none.

        Raises:
            CallOrderError: In stage 2 on several nodes no rank has it before ``average_grads()``.
            PartitionError: ``param`` is none of the optimizer's parameters, or its gradient is not
                dense.
        """
        self._core.require_open()
        registry = self._core.parts.registry
        if (index := registry.index_of(param)) is None:
            raise PartitionError(
                f"param must be a parameter of this optimizer; got {type(param).__name__}. Pass "
                "one of those in opt.param_groups."
            )
        binding = registry.bindings[index]
        array = registry.adapter.grad(param, binding.name) if binding.has_grad() else None
        if array is None:
            return None
        shown = registry.host(array).view()
        shown.flags.writeable = False
        return shown

    def adopt(self, rank: int = 0) -> None:
        """Set the parameters of all ranks to those of one, with what was written to them there.

        What other ranks have written to theirs is gone.

        Collective: every rank.

        Args:
            rank: The rank.

        Raises:
            RankMismatchError: Ranks name different ones.
            HyperparamsError: There is no such rank.
        """
        self._core.groups.take_over("adopt()")
        ranks = range(self._core.topology.world_size)
        error: Exception | None = None
        if rank not in ranks:
            error = HyperparamsError(
                f"rank must be a rank, 0 to {ranks[-1]}; got {rank!r}. Leave it out for rank 0."
            )
        changes, found_error = attempt(self._core.params.find_changes)
        if rank == self._core.topology.rank:  # what others have done is to be dropped
            error = error or found_error
        self._core.enter_call("adopt()", {"rank": rank}, error)
        step = self._core.last_step.step
        self._core.parts.overlap.settle(step)
        self._core.params.adopt_from(rank, changes or UserChanges(), step)
        self._core.parts.start_step(step + 1)
        self._core.last_step = self._core.last_step.without_poison()
