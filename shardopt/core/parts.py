"""The parts of an optimizer, put together."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from mpi4py import MPI

from shardopt.backends.base import Backend, Device
from shardopt.backends.cpu.backend import CpuBackend
from shardopt.backends.devices import HOST, make_device
from shardopt.combinations import Job, why_not_prefetch, why_not_stage
from shardopt.comm.collectives import Collectives
from shardopt.comm.consensus import Consensus, attempt, make_consensus
from shardopt.comm.failure import FailurePolicy
from shardopt.comm.node_memory.arena import Arena
from shardopt.comm.topology import Topology
from shardopt.comm.waiting import deadline
from shardopt.core.clipping import Clipping
from shardopt.core.tracing import Tracing, agree_on_trace, start_trace
from shardopt.errors import RankFailureError
from shardopt.layout.dtypes import wire_of
from shardopt.layout.partition import Partition, plan_partition
from shardopt.layout.ring import ring_bucket_nbytes
from shardopt.layout.traffic import default_bucket_nbytes
from shardopt.measure.cores import cores_per_rank
from shardopt.overlap.backward import Overlap, make_overlap
from shardopt.overlap.gradients import make_gradients
from shardopt.overlap.prefetch import NoPrefetch, Prefetch, make_prefetch
from shardopt.params.adapter import Adapter
from shardopt.params.forms import FormRules
from shardopt.params.gradients import Gradients
from shardopt.params.inputs import mask_of
from shardopt.params.registry import Registry
from shardopt.policy import ShardPolicy
from shardopt.rule.cohorts import Cohorts
from shardopt.rule.hyperparams import Rule
from shardopt.store.device import OnDevice
from shardopt.store.memory import Memory
from shardopt.store.residence import InNodeMemory, Residence
from shardopt.trace import Trace
from shardopt.transport.assembly import make_sync
from shardopt.transport.copies import make_copies
from shardopt.transport.sync import BucketSync
from shardopt.transport.updating import Updates


@dataclass(frozen=True)
class Parts:
    """Everything that a step is made of.

    Attributes:
        policy: How to shard.
        failure: What to do about ranks that are lost.
        topology: The ranks, with communicators of shardopt's own that all optimizers share.
        consensus: How they agree.
        num_cores: This rank's share of the cores it may run on.
        backend: Computes.
        memory: Parameters, gradients and optimizer state.
        registry: The framework's parameters.
        rule: Step counts and coefficients.
        sync: Gradients and parameters between nodes.
        grads: Gradients on their way to the kernel.
        overlap: Communication beside backward.
        prefetch: Communication beside forward.
        clipping: Clips, and skips steps.
        tracing: The trace of this rank.
        refused: Why the policy cannot be had here, for all ranks to raise, or None.
        job: What decides on that.
    """

    policy: ShardPolicy
    failure: FailurePolicy
    topology: Topology
    consensus: Consensus
    num_cores: int
    backend: Backend
    memory: Memory
    registry: Registry[Any]
    rule: Cohorts
    sync: BucketSync
    grads: Gradients
    overlap: Overlap
    prefetch: Prefetch
    clipping: Clipping
    tracing: Tracing
    refused: Exception | None
    job: Job

    @property
    def trace(self) -> Trace:
        """Shows what this rank does, and when."""
        return self.tracing.trace

    @property
    def collectives(self) -> Collectives:
        """Small collectives with a deadline."""
        return self.consensus.collectives

    @property
    def residence(self) -> Residence:
        """Where frameworks hold parameters and gradients, and where steps compute."""
        return self.memory.residence

    def meet(self, step: int, phase: str) -> None:
        """Wait for all ranks; their stores to shared memory before can be read after.

        Collective: every rank. See [Note: when stores become visible].
        """
        self.memory.publish()
        self.consensus.barrier(step, phase)
        self.memory.acquire()

    def send_grads(self, present: int) -> None:
        """Copy this rank's gradients to where others read them, if that is elsewhere.

        Args:
            present: Bit mask of the parameters that have a gradient on this rank.
        """
        if not self.residence.is_home:
            self.sync.copies.send_grads(self.registry.mask_of_live(), present)

    def adopt_unseen(self, replaced: Collection[int]) -> None:
        """Adopt writes to parameters that nobody sees; see ``Residence.adopt_unseen``.

        Args:
            replaced: The parameters that have values from elsewhere.
        """
        if not self.residence.is_home:
            others = set(range(len(self.registry.bindings))).difference(replaced)
            spans = self.memory.local_runs(self.registry.partition, mask_of(others))
            self.residence.adopt_unseen(spans)

    def note_update(self, present: int) -> None:
        """Note that a step has updated a bit mask of parameters, and their state."""
        if not self.residence.is_home:
            spans = self.memory.local_runs(self.registry.partition, present)
            self.residence.note_update(spans)

    def start_step(self, step: int, *, was_changed: bool = False) -> None:
        """Get ready for the gradients of step ``step``; see ``Overlap.start_step``."""
        self.sync.reset(step)
        self.overlap.start_step(step, was_changed=was_changed)

    def free(self, call: str) -> None:
        """Leave parameters with the values that they have, and release all else.

        Collective: every rank.

        Args:
            call: The user's call, for messages.
        """
        self.registry.release()
        with deadline(self.policy.timeout_s, call, self.failure):
            self.prefetch.free()
            self.overlap.free()
            self.tracing.align(self.consensus, self.sync.step, call)
            self.grads.free()
            self.memory.free()
            self.sync.close()
            self.memory.arena.reclaim()
            self.consensus.free()
        self.trace.close()
        self.backend.close()
        if self.residence.holder is not self.backend:
            self.residence.holder.close()


def kind_of(device: str) -> str:
    """Return what kind of device it is, which ranks must share; their numbers differ."""
    return device.partition(":")[0]


def _make_residence(
    device: str | None, host: Backend, consensus: Consensus, call: str, *, offload: bool
) -> tuple[Residence, str]:
    """Choose where parameters live, and where steps compute. Collective: every rank.

    Args:
        device: See ``make_parts``.
        host: Computes on this rank's cores.
        consensus: The ranks.
        call: The user's call, for messages.
        offload: Whether steps compute there although parameters are on a device.

    Returns:
        The residence, and the device that all parameters must be on.
    """
    everyone = consensus.collectives.allgather(device, 0, call)
    kinds = {kind_of(each) for each in everyone if each is not None}
    if device is None or len(kinds) > 1:
        return InNodeMemory(host), HOST
    if kinds == {HOST} or None in everyone:  # the error of a rank without is raised soon
        return InNodeMemory(host), device
    arena = consensus.group.arena
    made = _make_device(device, arena, consensus, call)
    return OnDevice(made, arena, host if offload else None), device


def _make_device(name: str, arena: Arena, consensus: Consensus, call: str) -> Device:
    """Return the device of this rank, or raise on all ranks if one cannot use its own."""
    made, error = attempt(make_device, name, arena)
    try:
        consensus.enter_call(call, {}, error, step=0)
    except RankFailureError:
        raise
    except Exception:
        consensus.free()
        raise
    assert made is not None
    return made


def _job_of(topology: Topology, residence: Residence, adapter: Adapter[Any]) -> Job:
    """Return the properties of the job that decide which settings it can have."""
    return Job(
        topology.num_nodes,
        on_device=not residence.is_home,
        shows_averages=adapter.shows_averages,
        reports_grads=adapter.reports_grads,
        widens_grads=adapter.widens_grads,
        reports_forward=adapter.reports_forward,
    )


def _plan_layout(topology: Topology, bucket_nbytes: int | None, *, has_one_row: bool) -> Partition:
    """Lay out no parameters yet, in buckets of the policy's size or of a default one."""
    num_nodes, node_size = topology.num_nodes, topology.node_size
    if bucket_nbytes is None and has_one_row:
        bucket_nbytes = ring_bucket_nbytes(num_nodes, node_size)
    elif bucket_nbytes is None:
        bucket_nbytes = default_bucket_nbytes(num_nodes, topology.world_size)
    return plan_partition((), num_nodes, node_size, bucket_nbytes)


def _make_sync(
    consensus: Consensus, memory: Memory, cohorts: Cohorts, policy: ShardPolicy, trace: Trace
) -> BucketSync:
    """Set up what moves gradients and parameters, and updates them if backward does."""
    topology, backend, updates = consensus.topology, memory.residence.backend, None
    if memory.has_one_row and policy.update_in_backward:
        updates = Updates(backend, memory.state, cohorts, trace)
    return make_sync(
        topology,
        backend,
        make_copies(topology, memory),
        consensus.collectives,
        wire_of(policy),
        trace,
        has_one_row=memory.has_one_row,
        sums_by_node=policy.accumulate == "node",
        updates=updates,
    )


def make_parts(
    comm: MPI.Intracomm,
    adapter: Adapter[Any],
    rule: Rule,
    device: str | None,
    max_grad_norm: float | None,
    policy: ShardPolicy,
    failure: FailurePolicy,
) -> Parts:
    """Set up the parts of an optimizer that has no parameters yet.

    Collective: every rank of ``comm``.

    Args:
        comm: The ranks that train together.
        adapter: Reads and binds the framework's parameters.
        rule: How a step computes.
        device: Where they are; None if this rank has none, or cannot tell. If ranks differ, the
            parameters will be refused on all of them.
        max_grad_norm: See ``Clipping``.
        policy: How to shard.
        failure: What to do about ranks that are lost.
    """
    call = f"{rule.name}()"
    trace, error = start_trace(policy.trace, device, adapter.annotate)
    consensus = make_consensus(comm, policy, failure, trace, call)
    tracing = agree_on_trace(consensus, trace, error, call)
    topology, collectives = consensus.topology, consensus.collectives
    with deadline(policy.timeout_s, call, failure):
        num_cores, arena = cores_per_rank(topology), consensus.group.arena
        arena.reclaim()  # what dropped optimizers have left
        host = CpuBackend(policy.threads or num_cores)
        offload = policy.offload is not None
        residence, device = _make_residence(device, host, consensus, call, offload=offload)
        job = _job_of(topology, residence, adapter)
        refused = why_not_stage(policy, job)
        has_one_row = policy.stage == 2 and refused is None
        layout = _plan_layout(topology, policy.bucket_nbytes, has_one_row=has_one_row)
        memory = Memory(
            topology.places[topology.rank],
            arena,
            residence,
            has_one_row=has_one_row,
            keeps_views=not (has_one_row and policy.update_in_backward),
        )
        rules = FormRules(policy.optim_bits, policy.master_weights)
        registry = Registry(adapter, layout, residence.holder, device, rules, rule)
        cohorts = Cohorts(layout, policy.seed)
        sync = _make_sync(consensus, memory, cohorts, policy, trace)
        grads = make_gradients(registry, memory, sync, consensus, policy.ring_nbytes)
        overlap = make_overlap(topology, collectives, registry, memory, sync, policy)
        job = replace(job, has_thread=overlap.thread is not None)
        refused = refused or why_not_prefetch(policy, job)
        prefetch: Prefetch = NoPrefetch()
        if refused is None:
            prefetch = make_prefetch(collectives, registry, memory, sync, overlap, policy)
    return Parts(
        policy=policy,
        failure=failure,
        topology=topology,
        consensus=consensus,
        num_cores=num_cores,
        backend=residence.backend,
        memory=memory,
        registry=registry,
        rule=cohorts,
        sync=sync,
        grads=grads,
        overlap=overlap,
        prefetch=prefetch,
        refused=refused,
        job=job,
        clipping=Clipping(max_grad_norm, policy, memory, topology.num_nodes),
        tracing=tracing,
    )
