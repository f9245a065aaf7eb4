"""The calls of an optimizer about its param groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardopt._version import __version__
from shardopt.comm.consensus import Outcome, attempt
from shardopt.core.regrouping import RegroupCall, Regrouping
from shardopt.params.groups import complete_groups, make_group
from shardopt.report import lost_state_warning, tell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardopt.comm.consensus import Description
    from shardopt.core.optimizer import Optimizer
    from shardopt.core.state_view import StateView
    from shardopt.params.groups import Group


class GroupCalls:
    """Adds param groups, and takes over those that users edit.

    Args:
        core: The optimizer.
        view: Its state as users see it.
    """

    def __init__(self, core: Optimizer[Any], view: StateView) -> None:
        self._core = core
        self._regrouping = Regrouping(core.parts, core.params, view)

    def add(self, param_group: Mapping[str, Any]) -> None:
        """Add a group of parameters; see ``extend``. Collective: every rank."""
        group, error = attempt(make_group, param_group, self._core.defaults)
        self.extend("add_param_group()", Outcome(None if group is None else [group], error))

    def extend(self, call: str, groups: Outcome[list[Group]]) -> None:
        """Add groups of parameters; those already there keep their state.

        Collective: every rank.

        Args:
            call: The user's call, for messages.
            groups: The new groups, complete with every hyperparameter, or the error met in making
                them.

        Raises:
            PartitionError: The parameters cannot be laid out, or one is in the optimizer already.
            HyperparamsError: A hyperparameter is out of range.
            RankMismatchError: Ranks were given different groups.
        """
        self.take_over(call)
        step, settings = self._core.last_step.step, self._settings()
        self._regrouping.add(RegroupCall(call, step, settings), groups)
        self._core.averaging.repeat()

    def are_edited(self) -> bool:
        """Whether users have edited groups since all ranks have last taken them over."""
        return self._core.parts.registry.is_edited(self._core.defaults)

    def complete(self) -> None:
        """Complete groups that users have put together, for a call that takes nothing over.

        Raises:
            PartitionError: One is not a group.
        """
        if self.are_edited():
            complete_groups(self._core.param_groups, self._core.defaults)

    def take_over(
        self, call: str, *, is_step: bool = False, takes_grads: bool = False
    ) -> Exception | None:
        """Take over groups that users have edited; see [Note: edited param groups].

        A step whose updates backward has made takes nothing over: an edit before its backward has
        been refused there, and one after it waits for the next call.

        Collective: every rank, if groups were edited on any.

        Args:
            call: The user's call, for messages.
            is_step: Whether it takes what backward has updated.
            takes_grads: Whether it takes gradients next, for which all ranks meet before they agree
                on anything.

        Returns:
            The error of this rank that is left for the agreement after gradients, if they are
            taken; else None.

        Raises:
            CallOrderError: Backward has updated parameters, and this is no step.
            PartitionError: A new parameter cannot be used.
            HyperparamsError: A hyperparameter is out of range.
            CheckpointError: State was assigned to a new parameter that does not fit it.
            RankMismatchError: Ranks have edited groups differently. The groups are then those from
                before the edit; likewise with the other errors but the first.
        """
        core = self._core
        core.require_open()
        are_edited = self.are_edited() and not (is_step and core.parts.grads.are_updates)
        error = attempt(core.arrive).error
        if error is None and not is_step:
            error = attempt(core.require_settled, call).error
        if takes_grads and not are_edited:
            return error
        if error is not None:
            core.enter_call(call, {}, error)  # the others meet it in whatever they agree on next
        if not are_edited:
            return None
        call = f"{call} with edited param_groups"
        lost = self._regrouping.take_over(RegroupCall(call, core.last_step.step, {}), core.defaults)
        core.averaging.repeat()
        names = {binding.name for binding in core.parts.registry.bindings}
        if core.last_step.poisoned_param not in names:
            core.last_step = core.last_step.without_poison()
        if lost:
            tell(lost_state_warning(lost), aloud=core.topology.rank == 0)
        return None

    def _settings(self) -> Description:
        """Return the settings that must be the same on every rank."""
        policy = self._core.policy.describe()
        norm = {"max_grad_norm": self._core.max_grad_norm}
        return {"shardopt's version": __version__, **policy, **norm}
