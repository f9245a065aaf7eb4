"""What moves parameters and gradients: the parts of an optimizer, put together."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Generic

from mpi4py import MPI

from shardopt.backends.cpu.kernel import CpuKernel
from shardopt.comm.consensus import Consensus
from shardopt.comm.shared_memory import shortage
from shardopt.comm.topology import cores_per_rank, make_topology
from shardopt.comm.waiting import deadline
from shardopt.core.consensus import StepConsensus
from shardopt.core.pipeline import GradNorm, Pipeline
from shardopt.errors import SharedMemoryError
from shardopt.layout.dtypes import wire_dtype_of
from shardopt.layout.footprint import window_nbytes
from shardopt.layout.partition import Partition, plan_partition
from shardopt.layout.traffic import default_bucket_nbytes
from shardopt.overlap.backward import BackwardOverlap
from shardopt.params.adapter import Adapter, P
from shardopt.params.binding import Binding
from shardopt.params.groups import Group
from shardopt.params.registry import LocalInputs, PlannedGroups, Registry, StepInputs
from shardopt.policy import ShardPolicy
from shardopt.report import StepReport, Stopwatch
from shardopt.rule.cohorts import Cohorts


class Engine(Generic[P]):
    """Holds the parts of an optimizer and leads them through steps, additions and loads.

    Whoever calls it has agreed on that with all ranks before; see ``Optimizer``.

    Collective: construction and every method that says so.

    Args:
        face: How the framework's parameters are read and rebound.
        comm: The ranks that train together.
        max_grad_norm: As for ``Optimizer``.
        policy: How to shard.

    Attributes:
        policy: As given.
        topology: The ranks, with communicators of shardopt's own.
        agreement: How they come together.
        num_cores: This rank's share of those it may run on.
        pipeline: The memory, and what computes there.
        registry: The framework's parameters.
        schedule: How far each parameter has come.
        accord: What ranks agree on around a step.
        early: What travels before the step.
    """

    def __init__(
        self,
        face: Adapter[P],
        comm: MPI.Intracomm,
        max_grad_norm: float | None,
        policy: ShardPolicy,
    ) -> None:
        self.policy = policy
        self.topology = topology = make_topology(comm, policy.share_node, policy.timeout_s)
        with self._deadline("NAdam()"):
            self.agreement = Consensus(topology, policy.timeout_s)
            self.num_cores = cores_per_rank(topology)
            self._kernel = CpuKernel(policy.threads or self.num_cores)
            collectives = self.agreement.collectives
            self.pipeline = Pipeline(topology, collectives, self._kernel, max_grad_norm, policy)
            num_nodes, node_size = topology.num_nodes, topology.node_size
            nbytes = policy.bucket_nbytes or default_bucket_nbytes(num_nodes, topology.world_size)
            layout = plan_partition((), num_nodes, node_size, nbytes)
            self.registry = Registry(face, layout)
            self.schedule = Cohorts(layout)
            self.accord = StepConsensus(self.agreement, self.registry, self.pipeline)
            self.early = BackwardOverlap(
                topology, collectives, self.registry, self.pipeline, policy.overlap
            )

    @property
    def partition(self) -> Partition:
        """Where every element lives."""
        return self.registry.partition

    # -- parameters --------------------------------------------------------------------------------

    def plan(self, make: Callable[[], list[Group]]) -> PlannedGroups:
        """Lay out more groups, and compile what they need; nothing has changed yet.

        Raises:
            PartitionError: They cannot be laid out.
            HyperparamsError: A hyperparameter is out of range.
        """
        addition = self.registry.plan(make)
        node_size, several = self.topology.node_size, self.topology.num_nodes > 1
        for dtype in {param.spec.dtype for param in addition.partition.params}:
            wire = wire_dtype_of(dtype, node_size, self.policy.wire_dtype) if several else None
            self._kernel.prepare(dtype, wire)
        return addition

    def shortage(self, partition: Partition) -> SharedMemoryError | None:
        """Say whether what is new in a partition does not fit the node."""
        regions = range(len(self.partition.regions), len(partition.regions))
        return shortage(window_nbytes(partition, regions)) if not self.topology.node_rank else None

    def extend(self, addition: PlannedGroups, call: str, step: int) -> None:
        """Take over planned groups, with rank 0's values.

        Collective: every rank.

        Args:
            addition: What ``plan`` gave.
            call: What the user has called, for messages.
            step: The last one, for messages.
        """
        self.early.settle(step)
        with self._deadline(call):
            self.pipeline.extend(addition.partition)
        bindings = self.registry.commit(addition, self.pipeline.buffers)
        self.schedule.extend(addition.partition)
        self._publish_initial(bindings, step)
        self.early.open(step + 1)

    def publish(self, step: int) -> None:
        """Let parameters be what each owner has written of them into its window.

        Collective: every rank.
        """
        self.early.settle(step)
        self.pipeline.publish_all(step)
        self.accord.meet(step, "load")
        self.registry.rebind()
        self.early.open(step + 1)

    def free(self, call: str) -> None:
        """Give parameters memory of their own again and release the rest. Collective."""
        self.registry.release()
        with self._deadline(call):
            self.early.free()
            self.pipeline.free()
            self.agreement.free()
        self._kernel.close()

    # -- a step ------------------------------------------------------------------------------------

    def step(
        self,
        before: StepReport,
        loss_scale: float,
        overflowed: bool,
        prepare: Callable[[], None],
    ) -> tuple[StepReport, list[int]]:
        """Average gradients and update parameters; see ``Optimizer.step``.

        Collective: every rank.

        Args:
            before: What the last step did.
            loss_scale: See ``Optimizer.step``.
            overflowed: Likewise.
            prepare: Brings gradients to where the face finds them; what it raises is agreed upon.

        Returns:
            What was done, and what listeners are to be told.
        """
        number, watch = before.step + 1, Stopwatch()
        survey, inputs = self.accord.enter_step(
            lambda: self._survey(prepare), number, loss_scale, overflowed
        )
        watch.lap("agree")
        measured = self._measure(inputs, number)
        watch.lap("reduce")
        poisoned = None if measured.skipped else self._update(survey, inputs, measured, number)
        watch.lap("update")
        poisoned_name, bids = self.accord.finish_step(poisoned, number)
        watch.lap("finish")
        sent, waited_s = self.pipeline.traffic, self.pipeline.waited_s
        self.early.open(number + 1, was_stale=inputs.stale != 0)
        none = measured.skipped or not self.partition.params
        report = StepReport(
            step=number,
            grad_norm=measured.grad_norm,
            clip_factor=measured.clip_factor,
            skipped=measured.skipped,
            loss_scale=inputs.loss_scale,
            num_updated=None if none else inputs.present.bit_count(),
            seconds=watch.seconds,
            waited_s=waited_s,
            copied_nbytes=survey.copied_nbytes,
            sent_nbytes=sent.nbytes,
            sent_messages=sent.messages,
        )
        return report.with_poison(
            poisoned_name, before.without_poison() if inputs.replaced else before
        ), bids

    def _survey(self, prepare: Callable[[], None]) -> LocalInputs:
        stale = self.early.close()  # before other gradients are copied in
        prepare()
        survey = self.registry.survey()
        copied_nbytes = survey.copied_nbytes + self.early.copied_nbytes
        return replace(survey, copied_nbytes=copied_nbytes, stale=stale)

    def _measure(self, inputs: StepInputs, step: int) -> GradNorm:
        if inputs.overflowed:
            self.early.settle(step)
            return GradNorm(skipped=True)
        return self.pipeline.measure(self.partition, step, self._grad_scale(inputs))

    def _update(
        self, survey: LocalInputs, inputs: StepInputs, measured: GradNorm, step: int
    ) -> int | None:
        self.schedule.regroup(inputs.present)
        grad_scale = self._grad_scale(inputs) * measured.clip_factor
        rows = self.schedule.advance(survey.hypers, grad_scale)
        reduced = measured.grad_norm is not None
        poisoned = self.pipeline.update(self.schedule, rows, step, reduced=reduced)
        self.registry.updated(inputs.present)
        return poisoned

    def _grad_scale(self, inputs: StepInputs) -> float:
        """Factor on the sum of gradients that makes it the average."""
        return 1.0 / self.topology.world_size / inputs.loss_scale

    # -- inside ------------------------------------------------------------------------------------

    def _deadline(self, call: str) -> AbstractContextManager[None]:
        return deadline(self.policy.timeout_s, call)

    def _publish_initial(self, bindings: Sequence[Binding], step: int) -> None:
        """Copy rank 0's values into the windows and bind parameters to them."""
        self.accord.meet(step, "allocate")  # every owner has touched its pages
        if self.topology.rank == 0:
            for binding in bindings:
                binding.fill()
        self.accord.meet(step, "fill")
        self.pipeline.spread(self.topology.places[0][0])
        self.accord.meet(step, "publish")
        for binding in bindings:
            binding.bind()
