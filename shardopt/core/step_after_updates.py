"""The step where backward has updated the parameters: it completes the updates and counts them."""

from collections.abc import Callable, Sequence

from shardopt.core.parts import Parts
from shardopt.core.shared_params import SharedParams, UserChanges
from shardopt.core.step import Step
from shardopt.errors import CallOrderError
from shardopt.overlap.updated import OPTION, UpdatedGradients
from shardopt.params.inputs import AgreedInputs
from shardopt.rule.hyperparams import Hyperparams


class StepAfterUpdates(Step):
    """A step whose updates backward has made; see [Note: between backward and step].

    Args:
        parts: The optimizer's.
        params: The parameters in shared memory.
        grads: Those of ``parts``.
        is_edited: Whether users have put other parameters into param groups.
    """

    def __init__(
        self,
        parts: Parts,
        params: SharedParams,
        grads: UpdatedGradients,
        is_edited: Callable[[], bool],
    ) -> None:
        super().__init__(parts, params)
        self._grads, self._is_edited = grads, is_edited
        grads.begin = self._begin

    def _begin(self) -> Sequence[Hyperparams]:
        """Return the hyperparameters of each param group, before anything is updated.

        Raises:
            Exception: One is out of range, or the user has edited groups, or has written to
                parameters or state.
        """
        if self._is_edited():
            raise CallOrderError(
                f"parameters must not be put into or taken out of param_groups between step() and "
                f"backward, with {OPTION}; got edited groups. Call opt.adopt(rank=0) on all ranks "
                "after an edit, or use add_param_group()."
            )
        self._require_unchanged(
            "between step() and backward", "Call opt.adopt(rank=0) on all ranks after a write"
        )
        self._params.refresh()  # pages that were written to and hold what they held
        return self._parts.registry.read_hypers()

    def _find_changes(self) -> UserChanges:
        return self._require_unchanged("between backward and step()", "Do so after step()")

    def _read_hypers(self) -> Sequence[Hyperparams]:
        return self._grads.hypers

    def _update(self, agreed: AgreedInputs, factor: float, *, publishes: bool) -> None:
        self._grads.commit(agreed.present)

    def _require_unchanged(self, when: str, remedy: str) -> UserChanges:
        """Return no changes.

        Args:
            when: Where changes cannot be followed, for messages.
            remedy: What to do instead.

        Raises:
            CallOrderError: There are some.
        """
        changes = self._params.find_changes()
        params = {*changes.replaced, *(each.param for each in changes.written)}
        if params:
            name = self._parts.registry.bindings[min(params)].name
            raise CallOrderError(
                f"parameters and their state must not be written to {when}, with {OPTION}; got "
                f"{name!r} written to. {remedy}."
            )
        return changes
