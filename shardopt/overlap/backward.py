"""Gradients that are sent to other nodes while backward still computes."""

import os
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from shardopt.comm.collectives import Collectives
from shardopt.comm.exit_hook import mpi_is_usable
from shardopt.comm.topology import Topology
from shardopt.comm.waiting import CONSTRUCTION
from shardopt.layout.partition import Partition
from shardopt.overlap.progress import ProgressThread
from shardopt.overlap.readiness import Readiness
from shardopt.params.registry import Registry
from shardopt.policy import ShardPolicy
from shardopt.store.memory import Memory
from shardopt.transport.sync import BucketSync

_MAX_BACKOFF = 64


class Overlap(Protocol):
    """Communication that runs beside backward, as a step sees it.

    Attributes:
        thread: Sends beside what this rank computes; None if nothing does.
    """

    thread: ProgressThread | None

    def grads_zeroed(self) -> None:
        """Note that all gradients are about to be zeroed."""
        ...

    def hold(self) -> int:
        """Start nothing more, and return the bit mask of buckets that have changed since.

        Raises:
            Exception: An error of the communication so far.
        """
        ...

    def sent_by_any(self, step: int) -> int:
        """Return the bit mask of buckets that some rank has started. Collective: every rank."""
        ...

    def settle(self, step: int) -> None:
        """Complete what any rank has started, without an update. Collective: every rank.

        Args:
            step: The last one, for messages.
        """
        ...

    def start_step(self, step: int, *, was_changed: bool = False) -> None:
        """Get ready for the gradients of step ``step``.

        Args:
            step: Its number.
            was_changed: Whether buckets had to be sent again in the last one, on any rank.
        """
        ...

    def free(self) -> None:
        """Release what is shared. Collective over the node."""
        ...


class NoOverlap:
    """No progress thread: the step communicates, and the hooks of stage 2 do; see ``Overlap``."""

    thread: ProgressThread | None = None

    def grads_zeroed(self) -> None:
        """See ``Overlap.grads_zeroed``."""

    def hold(self) -> int:
        """See ``Overlap.hold``."""
        return 0

    def sent_by_any(self, step: int) -> int:
        """See ``Overlap.sent_by_any``."""
        return 0

    def settle(self, step: int) -> None:
        """See ``Overlap.settle``."""

    def start_step(self, step: int, *, was_changed: bool = False) -> None:
        """See ``Overlap.start_step``."""

    def free(self) -> None:
        """See ``Overlap.free``."""


class ParamsOverlap(NoOverlap):
    """A progress thread for parameters alone, as hooks exchange gradients; see ``Overlap``.

    Collective over the node: construction.

    Args:
        memory: Of the node.
        sync: Sends parameters.
    """

    def __init__(self, memory: Memory, sync: BucketSync) -> None:
        self._thread = ProgressThread(memory, sync, sends_grads=False)
        self.thread = self._thread

    def hold(self) -> int:
        """See ``Overlap.hold``."""
        self._thread.hold()
        return 0

    def settle(self, step: int) -> None:
        """See ``Overlap.settle``."""
        self._thread.retract()

    def start_step(self, step: int, *, was_changed: bool = False) -> None:
        """See ``Overlap.start_step``."""
        self._thread.collect(step)

    def free(self) -> None:
        """See ``Overlap.free``."""
        self._thread.free()


class BackwardOverlap:
    """Starts the reduce-scatter of a bucket as soon as all ranks of the node have its gradients.

    [Note: gradients sent during backward]
    If a framework reports what backward has accumulated, buckets are sent before the step:
    ``Readiness`` counts, ranks announce how many buckets are ready, and what all ranks of a node
    have announced is sent by a ``ProgressThread``.

    If a gradient changes after its bucket was announced, or somebody puts another in its place, the
    bucket has *changed*. Ranks agree on the changed buckets when the step begins and send them
    again: the bits are those of gradients as they are when ``step`` is called. Writes that the
    framework does not see (torch: through ``.data`` or ``.numpy()``) go unnoticed. If buckets had
    to be sent again, overlap is off for the next 1, 2, 4 ... 64 steps.

    On devices nothing is sent before the step: that backward has handed a gradient to one does not
    mean that it is there, and a device's queue is the framework's, which no thread may use.

    Implements ``Overlap``. Collective over the node: construction.

    Args:
        topology: The ranks.
        collectives: The same.
        registry: This rank's parameters.
        memory: Their memory.
        sync: Sends gradients.

    Attributes:
        thread: Sends them.
    """

    def __init__(
        self,
        topology: Topology,
        collectives: Collectives,
        registry: Registry[Any],
        memory: Memory,
        sync: BucketSync,
    ) -> None:
        self._thread = ProgressThread(memory, sync)
        self.thread: ProgressThread | None = self._thread
        self._pid = os.getpid()
        self._collectives = collectives
        self._registry = registry
        self._memory = memory
        self._sync = sync
        self._readiness = Readiness()
        self._partition: Partition | None = None
        self._version: list[object] = []  # of each gradient when its bucket was announced
        self._changed = 0
        self._halted = False
        self._backoff = self._next_backoff = 0  # steps without overlap

    # -- while backward runs -----------------------------------------------------------------------

    def on_grad_ready(self, param: Any) -> None:
        """Note that backward has accumulated into a gradient.

        Does nothing in a forked child, whose gradients are not those of this rank, nor after
        ``MPI.Finalize()``.
        """
        if not mpi_is_usable(self._pid):
            return
        index = self._registry.index_of(param)
        if index is None or not self._readiness.knows(index):
            return
        num_expected = self._readiness.count(index)
        if num_expected < 0:
            self._mark_changed(index)
        if num_expected != 0:
            return
        binding = self._registry.bindings[index]
        if not binding.holds_grad():
            self._halted = True  # the step will copy it, or report what is wrong with it
            return
        self._version[index] = binding.grad_version()
        self._readiness.mark_ready(index)
        if not self._halted and not self._backoff:
            self._announce()

    def grads_zeroed(self) -> None:
        """See ``Overlap.grads_zeroed``."""
        if self._readiness.is_counting:
            self._halted = True
            self._changed |= (1 << self._thread.num_announced) - 1

    def _announce(self) -> None:
        """Announce the buckets that have become ready."""
        start = self._thread.num_announced
        stop = self._readiness.num_ready(start)
        if stop == start:
            return
        for bucket in range(start, stop):
            for index in self._readiness.unused_in(bucket):
                self._version[index] = self._registry.bindings[index].grad_version()
        self._memory.publish()
        self._thread.announce(stop)

    # -- around a step -----------------------------------------------------------------------------

    def hold(self) -> int:
        """See ``Overlap.hold``."""
        self._thread.hold()
        self._halted = True
        for index in self._readiness.params_before(self._thread.num_announced):
            if not self._is_as_announced(index):
                self._mark_changed(index)
        return self._changed

    def sent_by_any(self, step: int) -> int:
        """See ``Overlap.sent_by_any``."""
        started = np.array([self._sync.reduction.num_started])
        most = self._collectives.allreduce(started, MPI.MAX, step, "settle")[0]
        return (1 << int(most)) - 1

    def settle(self, step: int) -> None:
        """See ``Overlap.settle``."""
        self._thread.retract()
        if self.sent_by_any(step):
            self._sync.square_sums(0)  # of nothing

    def start_step(self, step: int, *, was_changed: bool = False) -> None:
        """See ``Overlap.start_step``."""
        if was_changed:
            self._backoff = self._next_backoff = min(2 * self._next_backoff or 1, _MAX_BACKOFF)
        elif self._backoff:
            self._backoff -= 1
        elif self._readiness.is_counting:
            self._next_backoff = 0
        if self._partition is not self._registry.partition:
            self._lay_out(self._registry.partition)
        self._readiness.start_step()
        self._version = [None] * len(self._registry.bindings)
        self._changed, self._halted = 0, False
        self._thread.collect(step)

    def free(self) -> None:
        """See ``Overlap.free``."""
        self._thread.free()

    # -- inside ------------------------------------------------------------------------------------

    def _is_as_announced(self, index: int) -> bool:
        """Whether a gradient is what it was when its bucket was announced."""
        binding = self._registry.bindings[index]
        if self._version[index] != binding.grad_version():
            return False
        return binding.holds_grad() or not (binding.has_grad() or binding.grad.any())

    def _mark_changed(self, index: int) -> None:
        self._changed |= self._readiness.mask_of(index, self._thread.num_announced)

    def _lay_out(self, partition: Partition) -> None:
        known = self._partition.params if self._partition is not None else ()
        if partition.params[: len(known)] != known:  # numbers mean other parameters now
            self._readiness = Readiness()
        self._partition = partition
        buckets = [partition.buckets[plan.bucket] for plan in self._sync.reduction.plans]
        params_of = [
            [index for index, _ in partition.params_in(bucket.region, bucket)] for bucket in buckets
        ]
        self._readiness.extend(params_of, len(partition.params))


def make_overlap(
    topology: Topology,
    collectives: Collectives,
    registry: Registry[Any],
    memory: Memory,
    sync: BucketSync,
    policy: ShardPolicy,
) -> Overlap:
    """Set up overlap if there are other nodes and all ranks can have it.

    In stage 2 hooks of backward exchange gradients, and only ``prefetch_params`` needs a thread.

    Collective: every rank.

    Args:
        topology: The ranks.
        collectives: The same.
        registry: This rank's parameters.
        memory: Their memory.
        sync: Sends gradients.
        policy: How to shard.
    """
    if topology.num_nodes == 1:
        return NoOverlap()
    adapter = registry.adapter
    wanted = policy.prefetch_params if memory.has_one_row else policy.overlap
    is_possible = wanted and memory.residence.is_home and adapter.reports_grads
    is_possible = is_possible and MPI.Query_thread() >= MPI.THREAD_MULTIPLE
    mine = np.array([int(is_possible)])
    if not collectives.allreduce(mine, MPI.MIN, 0, CONSTRUCTION)[0]:
        return NoOverlap()
    if memory.has_one_row:
        return ParamsOverlap(memory, sync)
    overlap = BackwardOverlap(topology, collectives, registry, memory, sync)
    adapter.on_grad_ready(overlap.on_grad_ready)
    return overlap
