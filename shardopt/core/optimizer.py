"""The optimizer that the front end of every framework has."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt._version import __version__
from shardopt.comm.consensus import Description, Outcome, attempt
from shardopt.comm.failure import Abort
from shardopt.comm.shared_memory import shortage
from shardopt.comm.topology import Topology
from shardopt.comm.waiting import deadline
from shardopt.core.listeners import StepListener
from shardopt.core.parts import make_parts
from shardopt.core.shared_params import SharedParams
from shardopt.core.state_dict import (
    OptimizerState,
    gather_state,
    load_state,
    local_state,
    parse_state,
    share_state,
)
from shardopt.core.step import Step, StepCall
from shardopt.errors import (
    CheckpointError,
    ClosedError,
    HyperparamsError,
    RankFailureError,
    ShardoptError,
    SharedMemoryError,
)
from shardopt.layout.dtypes import wire_dtype_of
from shardopt.layout.footprint import MemoryReport, plan_memory, shared_nbytes
from shardopt.layout.partition import Partition
from shardopt.params.adapter import Adapter, P
from shardopt.params.groups import Group, make_group
from shardopt.params.registry import PlannedGroups, describe_groups
from shardopt.policy import ShardPolicy
from shardopt.report import StepReport, tell
from shardopt.rule.nadam import StepCount


class Optimizer(Generic[P]):
    """NAdam whose moments and updates are sharded over MPI ranks.

    A node has one copy of the parameters, in memory that all its ranks address; each rank writes
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
        SharedMemoryError: The node's shared memory is too small.
        LauncherError: The job was started with another MPI's launcher.

    Attributes:
        comm: The communicator given.
        last_step: The report of the last ``step()``.
        parts: Its parts, for checkpoints and those who look inside.
        params: The parameters in every node's shared memory.
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
        self.params = SharedParams(self.parts)
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
        self._require_open()
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
        self._require_open()
        parts = self.parts
        parts.overlap.grads_zeroed()
        cleared = parts.registry.cleared_by(set_to_none=set_to_none)
        parts.memory.zero_grads()
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
        self._require_open()
        parts, step = self.parts, self.last_step.step
        planned, error = attempt(self._plan, groups)
        self.enter_call(call, {**self._settings, **describe_groups(planned)}, error)
        assert planned is not None
        self.enter_call(call, {}, self._shortage(planned.partition))
        parts.overlap.settle(step)
        with deadline(parts.policy.timeout_s, call, parts.failure):
            parts.memory.extend(planned.partition)
            parts.sync.extend(planned.partition, parts.memory.buffers)
        bindings = parts.registry.register(planned, parts.memory.buffers)
        parts.rule.extend(planned.partition)
        self.params.initialize(bindings, step)
        parts.start_step(step + 1)

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copy this rank's part of the state; no communication.

        Returns:
            ``state``: for each parameter's index ``step``, ``mu_product`` and the elements of
            ``exp_avg`` and ``exp_avg_sq`` that this rank owns, [owned_numel], with ``slices``,
            their runs of the flattened parameter. ``param_groups``: as torch has it.
        """
        self._require_open()
        return local_state(self._state)

    def gather_state_dict(self, root: int = 0) -> dict[str, Any] | None:
        """Gather the whole state on one rank, in the format of torch.optim.NAdam with NumPy arrays.

        Collective: every rank.

        Returns:
            On ``root`` the state dict, with moments in the parameters' shapes; None elsewhere.

        Raises:
            CheckpointError: ``root`` is no rank.
        """
        self._require_open()
        ranks, error = range(self.topology.world_size), None
        if root not in ranks:
            error = CheckpointError(
                f"root must be a rank, 0 to {ranks[-1]}; got {root!r}. Leave it out for rank 0."
            )
        self.enter_call("gather_state_dict()", {"root": root}, error)
        return gather_state(self._state, self.parts.collectives, root, self.last_step.step)

    def load_state_dict(self, state_dict: Mapping[str, Any] | None) -> None:
        """Continue from another state; parameters themselves are not in it.

        Collective: every rank.

        Args:
            state_dict: This rank's, as ``state_dict`` returned it on as many ranks; or a whole one,
                as ``gather_state_dict`` or torch.optim.NAdam returned it. Ranks that have none pass
                None and get that of the lowest rank that has a whole one.

        Raises:
            CheckpointError: It is of another model or another number of ranks. Nothing has changed
                then.
        """
        self._require_open()
        call, adapter = "load_state_dict()", self.parts.registry.adapter
        parsed, error = attempt(parse_state, state_dict, self._state, adapter)
        self.enter_call(call, {}, error)
        loaded = share_state(parsed, self.partition, self.parts.collectives, self.last_step.step)
        steps = [count.step for count in loaded.step_counts]
        groups = {"the state's steps": steps, "the state's param_groups": loaded.groups}
        self.enter_call(call, groups)
        load_state(loaded, self._state)
        self.restore(loaded.groups, loaded.step_counts, self.last_step.without_poison())

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
        self._require_open()
        self.parts.consensus.enter_call(call, description, error, step=self.last_step.step)

    def restore(
        self, groups: Sequence[Group], step_counts: Sequence[StepCount], report: StepReport
    ) -> None:
        """Continue from other hyperparameters and step counts; moments are in place already."""
        self.parts.rule.set_step_counts(step_counts)
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
        return plan_memory(self.partition, self.parts.policy.wire_dtype)

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
        """Move parameters to memory of their own and release what is shared.

        A parameter whose value was replaced since the last step keeps the new one.

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
        for dtype in {param.spec.dtype for param in planned.partition.params}:
            wire = wire_dtype_of(dtype, node_size, parts.policy.wire_dtype) if several else None
            parts.backend.kernel.prepare(dtype, wire)
        return planned

    def _shortage(self, partition: Partition) -> SharedMemoryError | None:
        """Return an error if the new regions of a partition do not fit on the node."""
        if self.topology.node_rank:
            return None
        regions = range(len(self.partition.regions), len(partition.regions))
        return shortage(shared_nbytes(partition, regions))

    @property
    def _state(self) -> OptimizerState:
        return OptimizerState(
            self.partition, self.parts.memory, self.step_counts, self.param_groups
        )

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(
                "the optimizer must be open; got a call after close(). Build a new one."
            )

    def _release(self, call: str) -> None:
        self._closed = True
        self.parts.free(call)


def _require_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise HyperparamsError(
            f"{name} must be of type {kind.__name__}; got {value!r}. Leave it out for the default."
        )
