"""The optimizer that the front end of every framework has."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt._version import __version__
from shardopt.comm.consensus import Description, Outcome, attempt
from shardopt.comm.failure import Abort
from shardopt.comm.node_memory.limits import Demand, memory_shortage
from shardopt.comm.topology import Topology
from shardopt.comm.waiting import deadline
from shardopt.core.listeners import StepListener
from shardopt.core.param_values import parse_values, share_values
from shardopt.core.parts import make_parts
from shardopt.core.shared_params import SharedParams, UserChanges
from shardopt.core.state_calls import StateCalls
from shardopt.core.state_view import StateView
from shardopt.core.step import Step, StepCall
from shardopt.errors import (
    ClosedError,
    HyperparamsError,
    RankFailureError,
    ShardoptError,
    SharedMemoryError,
)
from shardopt.layout.dtypes import wire_dtype_of
from shardopt.layout.footprint import MemoryReport, plan_memory, plan_node_need
from shardopt.layout.partition import Partition
from shardopt.params.adapter import Adapter, P
from shardopt.params.groups import Group, make_group
from shardopt.params.registry import PlannedGroups, describe_groups
from shardopt.policy import ShardPolicy
from shardopt.report import StepReport, diverged_warning, tell
from shardopt.rule.nadam import StepCount

_SMALL_NBYTES = 1 << 20


class Optimizer(Generic[P]):
    """NAdam whose moments and updates are sharded over MPI ranks.

    A node has one copy of the parameters, in memory of which each rank has a view; each rank writes
    gradients of its own and updates its shard of the parameters. Gradients are averaged over
    ranks. Rank 0's initial parameters win.

    Collective: construction and every method that says so. If one rank raises, all ranks raise.

    Args:
        groups: The param groups, complete with every hyperparameter, or the error met in making
            them, which all ranks will raise; see ``make_groups``.
        adapter: Reads and binds the framework's parameters.
        defaults: Hyperparameters of groups added later that do not set their own.
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
        last_step: The report of the last ``step()``.
        parts: Its parts, for checkpoints and those who look inside.
        params: The parameters in the memory of every node.
        states: The calls about the optimizer state.
    """

    def __init__(
        self,
        groups: Outcome[list[Group]],
        *,
        adapter: Adapter[P],
        defaults: Mapping[str, Any],
        max_grad_norm: float | None,
        comm: MPI.Intracomm | None,
        policy: ShardPolicy,
    ) -> None:
        self.comm = MPI.COMM_WORLD if comm is None else comm
        _require_kind("comm", self.comm, MPI.Intracomm)
        _require_kind("policy", policy, ShardPolicy)
        failure = Abort()
        failure.watch()
        self.defaults = dict(defaults)
        self.last_step = StepReport()
        self._closed = False
        self._settings: Description = {
            "shardopt's version": __version__,
            **policy.describe(),
            "max_grad_norm": max_grad_norm,
        }
        self.parts = make_parts(self.comm, adapter, max_grad_norm, policy, failure)
        state_view = StateView(self.parts)
        self.params = SharedParams(self.parts, state_view)
        self.states = StateCalls(self, state_view)
        self._step = Step(self.parts, self.params)
        try:
            self.extend("NAdam()", groups)
        except RankFailureError:
            raise  # releasing needs every rank
        except (ShardoptError, TypeError, ValueError):
            self._release("NAdam()")
            raise

    # -- a step ------------------------------------------------------------------------------------

    def step(
        self,
        *,
        loss_scale: float = 1.0,
        overflowed: bool = False,
        error: Exception | None = None,
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

        Raises:
            PartitionError: A parameter or gradient was replaced by one of another shape or dtype.
            HyperparamsError: A hyperparameter in ``param_groups`` is out of range.
            RankMismatchError: Ranks have different hyperparameters or make different calls.
            RankFailureError: A rank stopped responding for ``policy.timeout_s``.
        """
        self.require_open()
        before = self.last_step
        self.last_step, votes = self._step.run(StepCall(loss_scale, overflowed, error), before)
        for warning in self.last_step.warnings(before):
            tell(warning, aloud=self.topology.rank == 0)
        self._step.consensus.notify(votes)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero this rank's gradients in place, or leave the parameters without.

        Args:
            set_to_none: A parameter without a gradient on any rank is skipped by ``step``.
        """
        self.require_open()
        parts = self.parts
        parts.overlap.grads_zeroed()
        cleared = parts.registry.cleared_by(set_to_none=set_to_none)
        parts.registry.zero_grads()
        parts.registry.bind_grads(cleared)

    # -- param groups ------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[Group]:
        """Dicts as in torch; hyperparameters written there hold from the next step on."""
        return self.parts.registry.param_groups

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Add a group of parameters; see ``extend``. Collective: every rank."""
        group, error = attempt(make_group, param_group, self.defaults)
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
        self.require_open()
        parts, step = self.parts, self.last_step.step
        planned, error = attempt(self._plan, groups)
        self.enter_call(call, {**self._settings, **describe_groups(planned)}, error)
        assert planned is not None
        self.enter_call(call, {}, self._shortage(planned))
        parts.overlap.settle(step)
        first_region = len(self.partition.regions)
        with deadline(parts.policy.timeout_s, call, parts.failure):
            parts.memory.extend(planned.partition)
            parts.sync.extend(planned.partition, parts.memory.buffers)
        bindings = parts.registry.register(planned, parts.memory.buffers)
        parts.rule.extend(planned.partition)
        self._activate(step)
        self.params.initialize(bindings, first_region, step)
        parts.start_step(step + 1)

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

    # -- for checkpoints ---------------------------------------------------------------------------

    @property
    def num_cores(self) -> int:
        """This rank's share of the cores it may run on."""
        return self.parts.num_cores

    @property
    def topology(self) -> Topology:
        """The ranks, with communicators of shardopt's own."""
        return self.parts.topology

    @property
    def step_counts(self) -> Sequence[StepCount]:
        """The steps that each parameter has taken."""
        return self.parts.rule.step_counts

    @property
    def listeners(self) -> list[StepListener]:
        """Background work that is polled after every step; the same on every rank."""
        return self._step.consensus.listeners

    def enter_call(
        self, call: str, description: Description, error: Exception | None = None
    ) -> None:
        """Make sure that all ranks make the same call alike; see ``Consensus``. Collective."""
        self.require_open()
        self.parts.consensus.enter_call(call, description, error, step=self.last_step.step)

    def restore(
        self, groups: Sequence[Group], step_counts: Sequence[StepCount], report: StepReport
    ) -> None:
        """Continue from other hyperparameters and step counts; moments are in place already."""
        self.parts.rule.set_step_counts(step_counts)
        self.continue_with(groups, report)

    def continue_with(self, groups: Sequence[Group], report: StepReport) -> None:
        """Continue from other hyperparameters."""
        self.last_step = report
        for group, values in zip(self.param_groups, groups, strict=True):
            group.update(values)

    # -- about it ----------------------------------------------------------------------------------

    @property
    def partition(self) -> Partition:
        """Where every element lives."""
        return self.parts.registry.partition

    def memory_report(self) -> MemoryReport:
        """Return the bytes of parameters, gradients and moments, here and without sharding."""
        trained = [binding.is_live for binding in self.parts.registry.bindings]
        return plan_memory(self.partition, self.parts.policy.wire_dtype, trained)

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
        self.require_open()
        parts, call, step = self.parts, "load_params()", self.last_step.step
        parsed, error = attempt(parse_values, values, parts.registry)
        self.enter_call(call, {}, error)
        loaded = share_values(parsed, parts.registry, parts.collectives, step)
        self.params.load(loaded.arrays, step)
        self.last_step = self.last_step.without_poison()
        return loaded.others

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
        self.require_open()
        ranks = range(self.topology.world_size)
        error: Exception | None = None
        if rank not in ranks:
            error = HyperparamsError(
                f"rank must be a rank, 0 to {ranks[-1]}; got {rank!r}. Leave it out for rank 0."
            )
        changes, found_error = attempt(self.params.find_changes)
        if rank == self.topology.rank:  # what others have done is to be dropped
            error = error or found_error
        self.enter_call("adopt()", {"rank": rank}, error)
        step = self.last_step.step
        self.parts.overlap.settle(step)
        self.params.adopt_from(rank, changes or UserChanges(), step)
        self.parts.start_step(step + 1)
        self.last_step = self.last_step.without_poison()

    def close(self) -> None:
        """Release gradients and moments. Parameters stay readable, with the values they have.

        Collective: every rank.
        """
        if self._closed:
            return
        for listener in list(self.listeners):
            listener.close()
        self.enter_call("close()", {})
        self.parts.overlap.settle(self.last_step.step)
        self._release("close()")

    # -- inside ------------------------------------------------------------------------------------

    def _plan(self, groups: Outcome[list[Group]]) -> PlannedGroups:
        """Lay out more groups, and compile what they need; nothing has changed yet."""
        parts = self.parts
        if groups.error is not None:
            raise groups.error
        assert groups.value is not None
        parts.clipping.require_valid()
        planned = parts.registry.plan(groups.value)
        node_size, several = parts.topology.node_size, parts.topology.num_nodes > 1
        new = planned.partition.params[len(parts.registry.bindings) :]
        for dtype in {param.spec.dtype for param in new}:
            wire = wire_dtype_of(dtype, node_size, parts.policy.wire_dtype) if several else None
            parts.backend.kernel.prepare(dtype, wire)
        return planned

    def _activate(self, step: int) -> None:
        """Have buckets exchanged that hold parameters which some rank trains. Collective."""
        parts = self.parts
        if parts.topology.num_nodes > 1:
            trained = parts.registry.mask_of_trained()
            for mask in parts.collectives.allgather(trained, step, "activate"):
                parts.sync.reduction.activate(mask)

    def _shortage(self, planned: PlannedGroups) -> SharedMemoryError | None:
        """Return an error if the memory of new groups cannot be had on the node."""
        topology, adapter = self.topology, self.parts.registry.adapter
        trained = [adapter.requires_grad(param) for param in planned.params]
        regions = range(len(self.partition.regions), len(planned.partition.regions))
        need = plan_node_need(planned.partition, topology.node, regions, trained)
        if need.least_nbytes < _SMALL_NBYTES:  # thousands of small optimizers are made quickly
            return None
        return memory_shortage(Demand(topology.node_size, need.least_nbytes, need.view_nbytes))

    def require_open(self) -> None:
        """Raise after ``close``."""
        if self._closed:
            raise ClosedError(
                "the optimizer must be open; got a call after close(). Build a new one."
            )

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
