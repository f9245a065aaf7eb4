"""The calls of an optimizer about its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardopt.comm.consensus import attempt
from shardopt.core.state_dict import OptimizerState, gather_state, part_warning
from shardopt.core.state_loading import load_state, plan_load
from shardopt.core.state_parsing import parse_state
from shardopt.errors import CheckpointError, CheckpointWarning
from shardopt.params.group_values import saved_values
from shardopt.report import tell

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shardopt.core.optimizer import Optimizer
    from shardopt.core.state_mapping import State
    from shardopt.core.state_view import StateView


class StateCalls:
    """Shows the optimizer state to users, and takes over what they load or write there.

    Args:
        core: The optimizer.
        view: Its state as users see it.
    """

    def __init__(self, core: Optimizer[Any], view: StateView) -> None:
        self._core = core
        self._view = view

    @property
    def is_whole(self) -> bool:
        """Whether this rank shows the whole state."""
        return self._view.home.is_whole

    @property
    def state(self) -> State:
        """The state of each parameter: ``step``, ``exp_avg``, ``exp_avg_sq`` and so on, as torch's.

        Parameters of 16 bits have a ``master``, too. Parameters that are frozen and have never
        stepped have no entry. The arrays are views; step counts are brought up to date whenever an
        entry is looked at. Whatever all ranks write there, in place or by assigning something else,
        holds from the next step on; parameters whose entries are gone start anew. On several nodes
        entries have no arrays, as each node has a part of them; nor have they where ranks cannot
        address each other's devices.

        Where the state is on devices the arrays are on the host. They show the state as it was when
        a rank of the node last looked one up after a step, here or in ``state_dict``. A write to
        one that shows the state before the last step raises a ``CheckpointError`` as soon as it is
        met, on all ranks if it is in a collective call, and is dropped.
        """
        self._core.require_settled("opt.state")
        self._core.wait_params()
        return self._view.mapping

    def set_state(self, entries: Mapping[Any, Any]) -> None:
        """Replace all entries of ``state``; parameters that have none there start anew."""
        self._core.require_settled("opt.state")
        self._core.wait_params()
        self._view.assign(entries)

    def reset_state(self, params: Iterable[Any] | None = None) -> None:
        """Have moments and step counts start anew at the next step; all ranks must do so.

        Args:
            params: The parameters; None for all.

        Raises:
            PartitionError: One is not the optimizer's.
        """
        self._core.require_settled("reset_state()")
        self._core.wait_params()
        self._view.reset(params)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in the format of torch's optimizer; no communication, and no copies.

        On one node, any rank's is the whole state. On several it is the part of this rank's node,
        and a warning says so after the first step. Where ranks cannot address each other's devices
        it is a copy of this rank's part, which counts as that of a node.

        Its arrays are views, which show later steps as well (on devices once somebody looks there);
        for a copy of this one, take ``copy.deepcopy(opt.state_dict())``, or save it to a file.

        Returns:
            ``state``: for each parameter's index ``step``, ``exp_avg`` and ``exp_avg_sq``, in the
            parameter's shape, and NAdam's ``mu_product``. ``param_groups``: as torch has it. On
            several nodes ``exp_avg`` and ``exp_avg_sq`` are the node's elements, [node_numel], with
            ``slices``, their runs of the flattened parameter, and ``shardopt`` has the number of
            the ``node`` and ``num_nodes``.

        Raises:
            CheckpointError: Something was put into ``state`` that does not belong there.
        """
        self._core.require_settled("state_dict()")
        self._core.parts.grads.require_whole("state_dict()")
        self._core.wait_params()
        self._core.groups.complete()
        if not self.is_whole and any(count.step for count in self._core.step_counts):
            tell(part_warning(*self._view.home.part), aloud=True)
        return self._view.state_dict(self._state)

    def gather_state_dict(self, root: int = 0) -> dict[str, Any] | None:
        """Copy the whole state to one rank, in the format of torch's optimizer.

        Collective: every rank.

        Returns:
            On ``root`` a state dict with copies, moments in the parameters' shapes; None elsewhere.

        Raises:
            CheckpointError: ``root`` is no rank.
        """
        self._core.groups.take_over("gather_state_dict()")
        ranks, error = range(self._core.topology.world_size), None
        if root not in ranks:
            error = CheckpointError(
                f"root must be a rank, 0 to {ranks[-1]}; got {root!r}. Leave it out for rank 0."
            )
        changes, found_error = attempt(self._core.params.find_changes)
        torn = attempt(self._core.parts.grads.require_whole, "gather_state_dict()").error
        self._core.enter_call("gather_state_dict()", {"root": root}, error or torn or found_error)
        assert changes is not None
        self._core.settle(changes)
        self._core.parts.residence.bring_home(params=False, state=True)
        self._core.parts.memory.publish()  # all ranks meet before it is read
        return gather_state(
            self._state, self._core.parts.collectives, root, self._core.last_step.step
        )

    def load_state_dict(self, state_dict: Mapping[str, Any] | None) -> None:
        """Continue from another state; parameters themselves are not in it.

        Collective: every rank.

        Args:
            state_dict: A whole one, as ``state_dict`` on one node, ``gather_state_dict`` or
                torch's optimizer of the same name returned it; or a part, as ``state_dict``
                returned it on several nodes. Ranks may pass different parts, or None, if all of
                them together have the whole. The names of parameters in it do not matter, only
                their order.

        Raises:
            CheckpointError: It is of another model, or shows this optimizer at another step, or
                ranks together lack a part. Nothing has changed then.
        """
        self._core.groups.take_over("load_state_dict()")
        call, collectives, step = (
            "load_state_dict()",
            self._core.parts.collectives,
            self._core.last_step.step,
        )
        loaded, error = attempt(parse_state, state_dict, self._state, self._view)
        changes, found_error = attempt(self._core.params.find_changes)
        self._core.enter_call(call, {}, error or found_error)
        assert changes is not None
        plan = plan_load(loaded, self._state, collectives, step)
        steps = [count.step for count in plan.step_counts]
        groups = [saved_values(group)[0] for group in plan.groups]
        same = {"the state's steps": steps, "the state's param_groups": groups}
        self._core.enter_call(call, same)
        self._core.settle(changes.without_edits())
        self._core.parts.residence.bring_home(params=False, state=True)  # some may be in place
        losses = load_state(loaded, plan, self._state, collectives, step)
        self._core.params.show_loaded(step, params=False, state=True)
        if loaded is None or not loaded.is_in_place or plan.step_counts != self._core.step_counts:
            self._core.parts.rule.set_step_counts(plan.step_counts)
        self._core.continue_with(plan.groups, self._core.last_step.without_poison())
        for is_lost, warning in zip(losses, (_ROUNDED, _LEFT_OUT), strict=True):
            if is_lost:
                tell(warning, aloud=self._core.topology.rank == 0)

    def release(self) -> None:
        """Leave users with what they hold; see ``StateView.release``."""
        self._view.release()

    @property
    def _state(self) -> OptimizerState:
        core = self._core
        return OptimizerState(
            core.partition,
            core.parts.memory,
            core.step_counts,
            core.param_groups,
            core.parts.registry.adapter,
            core.parts.residence.holder,
            core.parts.registry.rule,
        )


_ROUNDED = CheckpointWarning(
    "load_state_dict() has rounded moments to 8 bits, as policy or param groups say optim_bits=8: "
    "training does not go on bit for bit. Set optim_bits=32 to keep all bits."
)

_LEFT_OUT = CheckpointWarning(
    "load_state_dict() has left masters out, as the policy says master_weights=False: parameters "
    "go on from their rounded values. Leave master_weights out to keep all bits."
)
