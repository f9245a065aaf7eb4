"""The parts of an optimizer, put together."""

from dataclasses import dataclass
from typing import Any

from mpi4py import MPI

from shardopt.backends.base import Backend
from shardopt.backends.cpu.backend import CpuBackend
from shardopt.comm.collectives import Collectives
from shardopt.comm.consensus import Consensus, make_consensus
from shardopt.comm.failure import FailurePolicy
from shardopt.comm.topology import Topology
from shardopt.comm.waiting import deadline
from shardopt.core.clipping import Clipping
from shardopt.layout.partition import plan_partition
from shardopt.layout.traffic import default_bucket_nbytes
from shardopt.measure.cores import cores_per_rank
from shardopt.overlap.backward import Overlap, make_overlap
from shardopt.params.adapter import Adapter
from shardopt.params.registry import Registry
from shardopt.policy import ShardPolicy
from shardopt.rule.cohorts import Cohorts
from shardopt.store.memory import Memory
from shardopt.transport.sync import BucketSync, make_sync


@dataclass(frozen=True)
class Parts:
    """Everything that a step is made of.

    Attributes:
        policy: How to shard.
        failure: What to do about ranks that are lost.
        topology: The ranks, with communicators of shardopt's own that all optimizers share.
        consensus: How they agree.
        num_cores: This rank's share of the cores it may run on.
        backend: Computes, and allocates memory.
        memory: Parameters, gradients and optimizer state.
        registry: The framework's parameters.
        rule: Step counts and coefficients.
        sync: Gradients and parameters between nodes.
        overlap: Communication beside backward.
        clipping: Clips, and skips steps.
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
    overlap: Overlap
    clipping: Clipping

    @property
    def collectives(self) -> Collectives:
        """Small collectives with a deadline."""
        return self.consensus.collectives

    def meet(self, step: int, phase: str) -> None:
        """Wait for all ranks; their stores to shared memory before can be read after.

        Collective: every rank. See [Note: when stores become visible].
        """
        self.memory.publish()
        self.consensus.barrier(step, phase)
        self.memory.acquire()

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
            self.overlap.free()
            self.memory.free()
            self.sync.close()
            self.memory.arena.reclaim()
            self.consensus.free()
        self.backend.close()


def make_parts(
    comm: MPI.Intracomm,
    adapter: Adapter[Any],
    max_grad_norm: float | None,
    policy: ShardPolicy,
    failure: FailurePolicy,
) -> Parts:
    """Set up the parts of an optimizer that has no parameters yet.

    Collective: every rank of ``comm``.

    Args:
        comm: The ranks that train together.
        adapter: Reads and binds the framework's parameters.
        max_grad_norm: See ``Clipping``.
        policy: How to shard.
        failure: What to do about ranks that are lost.
    """
    consensus = make_consensus(comm, policy, failure)
    topology, collectives = consensus.topology, consensus.collectives
    num_nodes, node_size = topology.num_nodes, topology.node_size
    nbytes = policy.bucket_nbytes or default_bucket_nbytes(num_nodes, topology.world_size)
    layout = plan_partition((), num_nodes, node_size, nbytes)
    with deadline(policy.timeout_s, "NAdam()", failure):
        num_cores = cores_per_rank(topology)
        backend = CpuBackend(policy.threads or num_cores)
        place = topology.places[topology.rank]
        arena = consensus.group.arena
        arena.reclaim()  # what dropped optimizers have left
        memory = Memory(place, arena, backend)
        registry = Registry(adapter, layout)
        sync = make_sync(topology, backend, collectives, policy.wire_dtype)
        overlap = make_overlap(topology, collectives, registry, memory, sync, wanted=policy.overlap)
    sends_float16 = num_nodes > 1 and policy.wire_dtype == "float16"
    return Parts(
        policy=policy,
        failure=failure,
        topology=topology,
        consensus=consensus,
        num_cores=num_cores,
        backend=backend,
        memory=memory,
        registry=registry,
        rule=Cohorts(layout),
        sync=sync,
        overlap=overlap,
        clipping=Clipping(max_grad_norm, policy, memory, sends_float16),
    )
