"""The optimizer that the front end of every framework has."""

from collections.abc import Sequence
from typing import Any, Generic

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt.comm.consensus import Description, Outcome, attempt
from shardopt.comm.failure import Abort
from shardopt.comm.topology import Topology
from shardopt.compiling import warn_of_cache_problems
from shardopt.core.averaging import Averaging
from shardopt.core.clipping import as_max_grad_norm
from shardopt.core.group_calls import GroupCalls
from shardopt.core.listeners import BackgroundWork, StepListener
from shardopt.core.param_calls import ParamCalls
from shardopt.core.parts import make_parts
from shardopt.core.shared_params import SharedParams, UserChanges
from shardopt.core.state_calls import StateCalls
from shardopt.core.state_view import StateView
from shardopt.core.step import Step, StepCall
from shardopt.core.step_after_updates import StepAfterUpdates
from shardopt.errors import (
    ClosedError,
    HyperparamsError,
    PartitionError,
    RankFailureError,
    ShardoptError,
)
from shardopt.layout.dtypes import wire_of
from shardopt.layout.footprint import MemoryReport, plan_memory
from shardopt.layout.partition import Partition
from shardopt.layout.ring import plan_ring
from shardopt.overlap.updated import UpdatedGradients
from shardopt.params.adapter import Adapter, P
from shardopt.params.group_values import update_groups
from shardopt.params.groups import Group
from shardopt.params.planning import find_device
from shardopt.params.writes import UserWrites
from shardopt.policy import ShardPolicy
from shardopt.report import (
    StepReport,
    diverged_warning,
    edited_warning,
    tell,
)
from shardopt.rule.coefficients import StepCount
from shardopt.rule.hyperparams import Rule


class Optimizer(Generic[P]):
    """An optimizer whose moments and updates are sharded over MPI ranks.

    A node has one copy of the parameters, in memory of which each rank has a view; each rank writes
    gradients of its own and updates its shard of the parameters. Gradients are averaged over
    ranks. Rank 0's initial parameters win.

    Collective: construction and every method that says so. If one rank raises, all ranks raise.

    Args:
        groups: The param groups, complete with every hyperparameter, or the error met in making
            them, which all ranks will raise; see ``make_groups``.
        adapter: Reads and binds the framework's parameters.
        rule: How a step computes.
        defaults: Hyperparameters of groups added later that do not set their own; read when one is
            added.
        max_grad_norm: Clip the global L2 norm of the averaged gradient to this, as
            ``torch.nn.utils.clip_grad_norm_`` does; None leaves it alone.
        comm: The ranks that train together; None is COMM_WORLD.
        policy: How to shard.

    Raises:
        PartitionError: The parameters cannot be laid out.
        HyperparamsError: A hyperparameter is out of range.
        RankMismatchError: Ranks were given different models or settings.
        SharedMemoryError: The memory of a node cannot be had.
        LauncherError: The job was started with another MPI's launcher.

    Attributes:
        comm: The communicator given.
        defaults: As given.
        last_step: The report of the last ``step()``.
        listeners: What is told of each step on this rank.
        parts: Its parts, for checkpoints and those who look inside.
        params: The parameters in the memory of every node.
        groups: The calls about param groups.
        states: The calls about the optimizer state.
        values: The calls about the values of parameters.
    """

    def __init__(
        self,
        groups: Outcome[list[Group]],
        *,
        adapter: Adapter[P],
        rule: Rule,
        defaults: Group,
        max_grad_norm: float | None,
        comm: MPI.Intracomm | None,
        policy: ShardPolicy,
    ) -> None:
        self.comm = MPI.COMM_WORLD if comm is None else comm
        _require_kind("comm", self.comm, MPI.Intracomm)
        _require_kind("policy", policy, ShardPolicy)
        failure = Abort()
        failure.watch()
        self.defaults = defaults
        self.last_step = StepReport()
        self.listeners: list[StepListener] = []
        self._closed = False
        self._is_advised = False  # that gradients should be averaged before they are changed
        norm, error = attempt(as_max_grad_norm, max_grad_norm, policy)
        if groups.error is None and error is not None:
            groups = Outcome(None, error)
        call = f"{rule.name}()"
        device, _ = attempt(find_device, adapter, groups.value or ())  # extend meets errors again
        self.parts = make_parts(self.comm, adapter, rule, device, norm, policy, failure)
        if groups.error is None and self.parts.refused is not None:
            groups = Outcome(None, self.parts.refused)
        writes = UserWrites(self.parts.memory, self.topology.places[self.topology.rank])
        state_view = StateView(self.parts, writes)
        self.params = SharedParams(self.parts, state_view, writes)
        self.groups = GroupCalls(self, state_view)
        self.states = StateCalls(self, state_view)
        self.values = ParamCalls(self)
        if isinstance(self.parts.grads, UpdatedGradients):
            self._step: Step = StepAfterUpdates(
                self.parts, self.params, self.parts.grads, self.groups.are_edited
            )
        else:
            self._step = Step(self.parts, self.params)
        try:
            self.groups.extend(call, groups)
        except RankFailureError:
            raise  # releasing needs every rank
        except (ShardoptError, TypeError, ValueError):
            self._release(call)
            raise
        warn_of_cache_problems(aloud=self.topology.rank == 0)

    # -- a step ------------------------------------------------------------------------------------

    def step(
        self,
        *,
        loss_scale: float = 1.0,
        overflowed: bool = False,
        error: Exception | None = None,
        num_writes: int = 0,
    ) -> None:
        """Average the gradients over ranks and update the parameters.

        Afterwards gradients hold nothing of use: call ``zero_grad`` before the next backward.

        Collective: every rank.

        Args:
            loss_scale: The factor on the loss before backward, which keeps small gradients from
                vanishing in 16 bits; may differ between ranks. Gradients are divided by it.
            overflowed: Whether a gradient is known not to be finite; if it is so on one rank, the
                step is skipped on all.
            error: An error that the front end has met with, which all ranks will raise, or None.
            num_writes: How often the front end's framework has written to each gradient since
                backward, which is no reason for a warning.

        Raises:
            CallOrderError: A backward has come after ``average_grads``.
            PartitionError: A parameter or gradient was replaced by one of another shape or dtype.
            HyperparamsError: A hyperparameter in ``param_groups`` is out of range.
            RankMismatchError: Ranks have different hyperparameters or groups, or make different
                calls.
            RankFailureError: A rank stopped responding for ``policy.timeout_s``.
        """
        earlier = self.groups.take_over("step()", is_step=True, takes_grads=True)
        before = self.last_step
        call = StepCall(loss_scale, overflowed, earlier or error, num_writes)
        with self.parts.trace.span("step", step=before.step + 1):
            self.last_step, votes = self._step.run(call, before)
        warnings = list(self.last_step.warnings(before))
        if self.last_step.edited_grads and not self._is_advised:
            self._is_advised = True
            warnings.append(edited_warning(self.last_step.step))
        for warning in warnings:
            tell(warning, aloud=self.topology.rank == 0)
        self._step.consensus.notify(votes)
        for listener in list(self.listeners):
            listener.after_step(self.last_step)

    def average_grads(self, loss_scale: float = 1.0) -> None:
        """Average the gradients over ranks now, to look at the average or to change it.

        Afterwards every rank's gradients are the average, as after the backward of DDP, in their
        own dtype: clipping, noise, masks and logs see what they see there. The step takes them as
        they are then, for each part of a parameter those of the rank that owns it, so change them
        alike on all ranks. A parameter with a gradient on some rank has one on all ranks.

        Call it after the last backward, before ``GradScaler.unscale_``; once more changes nothing.
        A backward after it makes the step raise, if the framework reports it (torch does). A step
        and ``zero_grad`` end it.

        Between nodes it sends the gradients once more, (M-1)/M of them with M nodes. In stage 2 on
        several nodes it makes ``p.grad`` usable, until the next backward or ``zero_grad``.

        Collective: every rank.

        Args:
            loss_scale: As for ``step``, by which gradients are divided now instead of there; the
                same on every rank.

        Raises:
            CallOrderError: A backward has come after it in the same step.
            HyperparamsError: The loss scale is no finite number > 0.
            PartitionError: A gradient was replaced by one of another shape or dtype.
            RankMismatchError: Ranks have different loss scales or make different calls.
            RankFailureError: A rank stopped responding for ``policy.timeout_s``.
        """
        error = self.groups.take_over("average_grads()", takes_grads=True)
        self.averaging.run(loss_scale, self.last_step.step + 1, error)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero this rank's gradients in place, or leave the parameters without.

        Args:
            set_to_none: A parameter without a gradient on any rank is skipped by ``step``.
        """
        self.require_open()
        parts = self.parts
        self._enter_queue()
        self.averaging.end()
        parts.overlap.grads_zeroed()
        parts.prefetch.grads_zeroed()
        if self.groups.are_edited():
            parts.registry.zero_pending(set_to_none=set_to_none)
        parts.grads.zero(set_to_none=set_to_none)

    # -- param groups ------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[Group]:
        """Dicts as in torch; what is written there holds from the next step on.

        Parameters may be edited as well, alike on all ranks: see [Note: edited param groups].
        """
        return self.parts.registry.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        if not isinstance(groups, list):
            raise PartitionError(
                f"param_groups must be a list of dicts; got {type(groups).__name__}. Put the "
                "groups into a list."
            )
        self.parts.registry.param_groups = groups

    # -- before a call -----------------------------------------------------------------------------

    def require_open(self) -> None:
        """Raise after ``close``."""
        if self._closed:
            raise ClosedError(
                "the optimizer must be open; got a call after close(). Build a new one."
            )

    def require_settled(self, call: str) -> None:
        """Refuse a call while backward has updated some parameters; see ``Gradients``.

        Args:
            call: The user's, for messages.
        """
        self.require_open()
        self.parts.grads.require_settled(call)

    def wait_params(self) -> None:
        """Wait until all parameters are here; see ``ShardPolicy.prefetch_params``.

        Raises:
            CallOrderError: This rank's user has written to a parameter on its way.
            RankFailureError: A rank was lost, or did not respond for ``policy.timeout_s``.
        """
        self.require_open()
        self.parts.prefetch.finish()

    def arrive(self) -> None:
        """Do all work behind what the user has done so far, with all parameters here."""
        self._enter_queue()
        self.parts.prefetch.finish()

    def _enter_queue(self) -> None:
        """Do all work behind what the framework has handed to its device so far."""
        residence = self.parts.residence
        if not residence.is_home:
            residence.enter(self.parts.registry.adapter.current_queue())

    # -- what users have done ----------------------------------------------------------------------

    def settle(self, changes: UserChanges) -> None:
        """Take over what this rank's user has done, rather than in the next step.

        Collective: every rank.

        Raises:
            RankMismatchError: Ranks have written to different parameters. Nothing has changed then.
        """
        agreed = self.params.settle(self.last_step.step, changes)
        if agreed.params:
            self.last_step = self.last_step.without_poison()
        if agreed.diverged:
            tell(diverged_warning(agreed.diverged), aloud=self.topology.rank == 0)

    # -- settings ----------------------------------------------------------------------------------

    @property
    def policy(self) -> ShardPolicy:
        """How to shard; its ``timeout_s`` may be set and holds from the next wait on."""
        return self.parts.policy

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that gradients are clipped to, or None."""
        return self.parts.clipping.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self.parts.clipping.max_grad_norm = as_max_grad_norm(value, self.policy)

    # -- for checkpoints ---------------------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        """The ranks, with communicators of shardopt's own."""
        return self.parts.topology

    @property
    def step_counts(self) -> Sequence[StepCount]:
        """The steps that each parameter has taken."""
        return self.parts.rule.step_counts

    @property
    def averaging(self) -> Averaging:
        """Averages gradients before a step."""
        return self._step.averaging

    @property
    def background(self) -> list[BackgroundWork]:
        """The work that all ranks poll after every step; the same on every rank."""
        return self._step.consensus.background

    def enter_call(
        self, call: str, description: Description, error: Exception | None = None
    ) -> None:
        """Make sure that all ranks make the same call alike; see ``Consensus``. Collective."""
        self.require_open()
        self.parts.memory.publish()
        self.parts.consensus.enter_call(call, description, error, step=self.last_step.step)
        self.parts.memory.acquire()

    def restore(
        self, groups: Sequence[Group], step_counts: Sequence[StepCount], report: StepReport
    ) -> None:
        """Continue from other hyperparameters and step counts; moments are in place already."""
        self.parts.rule.set_step_counts(step_counts)
        self.continue_with(groups, report)

    def continue_with(self, groups: Sequence[Group], report: StepReport) -> None:
        """Continue from other hyperparameters."""
        self.last_step = report
        update_groups(self.param_groups, groups)

    # -- about it ----------------------------------------------------------------------------------

    @property
    def partition(self) -> Partition:
        """Where every element lives."""
        return self.parts.registry.partition

    def memory_report(self) -> MemoryReport:
        """Return the bytes of parameters, gradients and moments, here and without sharding."""
        parts = self.parts
        return plan_memory(
            self.partition,
            wire_of(parts.policy),
            [binding.is_live for binding in parts.registry.bindings],
            needs_norm=parts.clipping.needs_norm,
            placement=parts.residence.placement,
            ring=plan_ring(self.partition, parts.policy.ring_nbytes)
            if parts.grads.are_averages or parts.grads.are_updates
            else None,
            sums_by_node=parts.policy.accumulate == "node",
            has_averages=parts.grads.are_averages,
            has_late=parts.registry.adapter.reports_grads,
        )

    def sum_over_ranks(self, values: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
        """Add up a few numbers over all ranks, with the deadline that steps have.

        Collective: every rank.

        Args:
            values: [n] numbers, as many on every rank.

        Returns:
            [n] float64 sums, the same on every rank.

        Raises:
            RankMismatchError: Ranks have different numbers of values.
            TypeError: Some of them are no numbers.
            ValueError: Likewise.
            RankFailureError: A rank stopped responding for ``policy.timeout_s``.
        """
        call, step = "sum_over_ranks()", self.last_step.step
        addends, error = attempt(np.array, values, np.float64)
        shape = None if addends is None else addends.shape
        self.enter_call(call, {"the shape of values": shape}, error)
        assert addends is not None
        return self.parts.collectives.allreduce(addends, MPI.SUM, step, call)

    def close(self) -> None:
        """Release gradients and moments. Parameters stay readable, with the values they have.

        Collective: every rank.
        """
        if self._closed:
            return
        for work in list(self.background):
            work.close()
        outcomes = [attempt(listener.close) for listener in self.listeners]
        self.listeners.clear()
        _, late = attempt(self.parts.prefetch.finish)
        unsettled = attempt(self.require_settled, "close()").error
        self.enter_call("close()", {}, late or unsettled)
        self.parts.overlap.settle(self.last_step.step)
        self._release("close()")
        for _, error in outcomes:
            if error is not None:  # other ranks need this one to release
                raise error

    # -- inside ------------------------------------------------------------------------------------

    def _release(self, call: str) -> None:
        self._closed = True
        try:
            self.states.release()
        finally:
            self.parts.free(call)


def _require_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise HyperparamsError(
            f"{name} must be of type {kind.__name__}; got {value!r}. Leave it out for the default."
        )
