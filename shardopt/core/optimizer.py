"""Optimizer: the optimizer that every framework's face is made of."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Self

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt._version import __version__
from shardopt.comm.collectives import Collectives
from shardopt.comm.consensus import Description, attempt
from shardopt.comm.failure import install_abort_hook
from shardopt.comm.topology import Topology
from shardopt.core.engine import Engine
from shardopt.core.listeners import StepListener
from shardopt.core.state_dict import (
    OptimizerState,
    gather_state,
    load_parsed,
    local_state,
    parse_state,
    share_parsed,
)
from shardopt.errors import (
    CheckpointError,
    ClosedError,
    HyperparamsError,
    RankFailureError,
    ShardoptError,
)
from shardopt.layout.footprint import MemoryReport, plan_memory
from shardopt.layout.partition import Partition
from shardopt.params.adapter import Adapter, P
from shardopt.params.groups import Group, make_group
from shardopt.params.registry import PlannedGroups, describe_addition
from shardopt.policy import ShardPolicy
from shardopt.report import StepReport, tell
from shardopt.rule.nadam import StepCount, as_real
from shardopt.store.buffers import ShardBuffers


class Optimizer(Generic[P]):
    """NAdam whose moments and updates are sharded over MPI ranks.

    Parameters live once on a node, in memory that all its ranks address; each rank writes
    gradients of its own and updates its shard of the parameters. Gradients are averaged over
    ranks. Rank 0's initial parameters win.

    Collective: construction and every method that says so. What one rank finds wrong, all raise.

    Args:
        make: Gives the param groups, complete with every hyperparameter; see ``make_groups``. What
            it raises is agreed upon.
        face: How the framework's parameters are read and rebound.
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
        last_step: What the last ``step()`` did.
        comm: The communicator given.
        num_cores: This rank's share of those it may run on.
    """

    def __init__(
        self,
        make: Callable[[], list[Group]],
        *,
        face: Adapter[P],
        defaults: Mapping[str, Any],
        max_grad_norm: float | None,
        comm: MPI.Intracomm | None,
        policy: ShardPolicy,
    ) -> None:
        self.comm = MPI.COMM_WORLD if comm is None else comm
        _require_kind("comm", self.comm, MPI.Intracomm)
        _require_kind("policy", policy, ShardPolicy)
        install_abort_hook()
        self.defaults = dict(defaults)
        self._settings: Description = {
            "shardopt's version": __version__,
            **policy.describe(),
            "max_grad_norm": max_grad_norm,
        }
        self.last_step = StepReport()
        self._closed = False
        self._engine = Engine(face, self.comm, max_grad_norm, policy)
        self.num_cores = self._engine.num_cores
        try:
            self.extend("NAdam()", make)
        except RankFailureError:
            raise  # to release needs every rank
        except (ShardoptError, TypeError, ValueError):
            self._release("NAdam()")
            raise

    # -- a step ------------------------------------------------------------------------------------

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss_scale: float = 1.0,
        overflowed: bool = False,
    ) -> Any:
        """Average the gradients over ranks and update the parameters.

        Afterwards gradients hold nothing of use: call ``zero_grad`` before the next backward.

        Collective: every rank.

        Args:
            closure: Computes the loss and the gradients; called first.
            loss_scale: What the loss was multiplied by before backward, to keep small gradients
                from vanishing in 16 bits; may differ between ranks. Gradients are divided by it.
            overflowed: Whether a gradient is known not to be finite; where it is so on one rank,
                the step is skipped on all.

        Returns:
            What the closure returned, or None.

        Raises:
            PartitionError: A parameter or gradient was replaced by one of another shape or dtype.
            HyperparamsError: A hyperparameter in ``param_groups`` is out of range.
            RankMismatchError: Ranks have different hyperparameters or make different calls.
            RankFailureError: A rank did not come within ``policy.timeout_s``.
        """
        loss = None if closure is None else closure()
        self._require_open()
        before = self.last_step
        self.last_step, bids = self._engine.step(before, loss_scale, overflowed, self._prepare_step)
        for warning in self.last_step.news(before):
            tell(warning, aloud=self.topology.rank == 0)
        self._engine.accord.tell_followers(bids)
        return loss

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero this rank's gradients in place, or give the parameters none.

        Args:
            set_to_none: A parameter without a gradient on any rank is skipped by ``step``.
        """
        self._require_open()
        self._engine.early.grads_zeroed()
        self._engine.registry.zero_grads(set_to_none, self._engine.pipeline.zero_grads)

    # -- param groups ------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[Group]:
        """Dicts as in torch; hyperparameters written there hold from the next step on."""
        return self._engine.registry.param_groups

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Add a group of parameters; see ``extend``. Collective: every rank."""
        self.extend("add_param_group()", lambda: [make_group(param_group, self.defaults)])

    def extend(self, call: str, make: Callable[[], list[Group]]) -> None:
        """Add groups of parameters; those already there keep their state.

        Collective: every rank.

        Args:
            call: What the user has called, for messages.
            make: Gives the new groups, complete with every hyperparameter. What it raises is
                agreed upon.

        Raises:
            PartitionError: The parameters cannot be laid out, or one is in the optimizer already.
            HyperparamsError: A hyperparameter is out of range.
            RankMismatchError: Ranks were given different groups.
        """
        self._require_open()
        addition, error = attempt(lambda: self._plan(make))
        self.enter_call(call, {**self._settings, **describe_addition(addition)}, error)
        assert addition is not None
        self.enter_call(call, {}, self._engine.shortage(addition.partition))
        self._engine.extend(addition, call, self.last_step.step)

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copy this rank's part of the state; no communication.

        Returns:
            ``state``: for each parameter's index ``step``, ``mu_product`` and the elements of
            ``exp_avg`` and ``exp_avg_sq`` that this rank owns, [owned_numel], with ``slices``,
            their runs of the flattened parameter. ``param_groups``: as torch has it.
        """
        self._require_open()
        return local_state(self._held())

    def gather_state_dict(self, root: int = 0) -> dict[str, Any] | None:
        """Bring the whole state to one rank, in the format of torch.optim.NAdam with NumPy arrays.

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
        return gather_state(self._held(), self.collectives, root, self.last_step.step)

    def load_state_dict(self, state_dict: Mapping[str, Any] | None) -> None:
        """Take over a state; parameters themselves are not in it.

        Collective: every rank.

        Args:
            state_dict: This rank's, as ``state_dict`` gave it on as many ranks; or a whole one, as
                ``gather_state_dict`` or torch.optim.NAdam gave it. Ranks that have none pass
                None and get that of the lowest rank that has a whole one.

        Raises:
            CheckpointError: It is of another model or another number of ranks. Nothing has changed
                then.
        """
        self._require_open()
        buffers, step = self.buffers, self.last_step.step
        parsed, error = attempt(
            lambda: parse_state(
                state_dict, self.partition, buffers, self.param_groups, self._engine.registry.face
            )
        )
        self.enter_call("load_state_dict()", {}, error)
        state = share_parsed(parsed, self.partition, self.collectives, step)
        steps = [clock.step for clock in state.step_counts]
        groups = {"the state's steps": steps, "the state's param_groups": state.groups}
        self.enter_call("load_state_dict()", groups)
        load_parsed(state, self.partition, buffers)
        self.take_over(state.groups, state.step_counts, self.last_step.without_poison())

    # -- for checkpoints ---------------------------------------------------------------------------

    @property
    def core(self) -> Self:
        """What all faces have in common: this."""
        return self

    @property
    def topology(self) -> Topology:
        """The ranks, with communicators of shardopt's own."""
        return self._engine.topology

    @property
    def collectives(self) -> Collectives:
        """For what ranks tell each other beside the steps, with their deadline."""
        return self._engine.agreement.collectives

    @property
    def buffers(self) -> Sequence[ShardBuffers]:
        """The memory of each region."""
        return self._engine.pipeline.buffers

    @property
    def step_counts(self) -> Sequence[StepCount]:
        """How far each parameter has come."""
        return self._engine.schedule.step_counts

    @property
    def listeners(self) -> list[StepListener]:
        """What goes on beside the steps; the same on every rank."""
        return self._engine.accord.listeners

    def enter_call(
        self, call: str, description: Description, error: Exception | None = None
    ) -> None:
        """Make sure that all ranks make the same call alike; see ``Consensus``. Collective."""
        self._require_open()
        self._engine.accord.enter_call(call, description, error, step=self.last_step.step)

    def find_replaced(self) -> dict[int, FloatArray]:
        """Find parameters that were replaced since the last step; see ``Registry``."""
        return self._engine.registry.find_replaced()

    def adopt(self, replaced: Mapping[int, FloatArray]) -> None:
        """Take over replaced parameters now, rather than in the next step. Collective."""
        if self._engine.accord.adopt(replaced, self.last_step.step):
            self.last_step = self.last_step.without_poison()

    def take_over(
        self, groups: Sequence[Group], step_counts: Sequence[StepCount], report: StepReport
    ) -> None:
        """Go on from other hyperparameters and step_counts, moments being in place already."""
        self._engine.schedule.set_clocks(step_counts)
        self.last_step = report
        for group, values in zip(self.param_groups, groups, strict=True):
            group.update(values)

    def take_over_params(self) -> None:
        """Let parameters be what each owner has written of them into its window. Collective."""
        self._engine.publish(self.last_step.step)

    # -- about it ----------------------------------------------------------------------------------

    @property
    def partition(self) -> Partition:
        """Where every element lives."""
        return self._engine.partition

    def memory_report(self) -> MemoryReport:
        """Bytes that parameters, gradients and moments take, here and without sharding."""
        return plan_memory(self.partition, self._engine.policy.wire_dtype)

    def sum_over_ranks(self, values: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
        """Add up a few numbers over all ranks, with the deadline that steps have.

        Collective: every rank.

        Args:
            values: [n] numbers, as many on every rank.

        Returns:
            [n] float64 sums, the same on every rank.

        Raises:
            RankFailureError: A rank did not come within ``policy.timeout_s``.
        """
        self._require_open()
        addends = np.array(values, np.float64)
        return self.collectives.allreduce(addends, MPI.SUM, self.last_step.step, "sum_over_ranks()")

    def close(self) -> None:
        """Give parameters memory of their own again and release the windows. Collective.

        A parameter whose value was replaced since the last step keeps what this rank put there.
        """
        if self._closed:
            return
        for follower in list(self.listeners):
            follower.close()
        self.enter_call("close()", {})
        self._engine.early.settle(self.last_step.step)
        self._release("close()")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:  # else other ranks may not come; the end of the process frees the windows
            self.close()

    # -- inside ------------------------------------------------------------------------------------

    def _plan(self, make: Callable[[], list[Group]]) -> PlannedGroups:
        _require_supported(self._settings["max_grad_norm"])
        return self._engine.plan(make)

    def _prepare_step(self) -> None:
        """Bring gradients to where the face finds them; what it raises is agreed upon."""

    def _held(self) -> OptimizerState:
        return OptimizerState(self.partition, self.buffers, self.step_counts, self.param_groups)

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(
                "the optimizer must be open; got a call after close(). Build a new one."
            )

    def _release(self, call: str) -> None:
        self._closed = True
        self._engine.free(call)


def _require_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise HyperparamsError(
            f"{name} must be of type {kind.__name__}; got {value!r}. Leave it out for the default."
        )


def _require_supported(max_grad_norm: object) -> None:
    if max_grad_norm is not None and not as_real("max_grad_norm", max_grad_norm) > 0:
        raise HyperparamsError(
            f"max_grad_norm must be > 0 or None; got {max_grad_norm!r}. Leave it out not to clip."
        )
