"""Updated parameters that arrive from other nodes while the next forward computes."""

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from shardopt.comm.collectives import Collectives
from shardopt.comm.exit_hook import mpi_is_usable
from shardopt.comm.node_memory.linux import PAGE_NBYTES
from shardopt.comm.waiting import wait_briefly
from shardopt.errors import CallOrderError, HyperparamsError, RankFailureError
from shardopt.layout.span import Span
from shardopt.overlap.backward import Overlap
from shardopt.overlap.progress import ProgressThread
from shardopt.params.inputs import mask_of
from shardopt.params.registry import Registry
from shardopt.policy import ShardPolicy
from shardopt.store.memory import Memory
from shardopt.transport.buckets import BucketPlan
from shardopt.transport.sync import BucketSync

if TYPE_CHECKING:
    from shardopt.layout.partition import Partition

NO_ORDER = 0
"""The digest of the order of a forward in which nothing was needed."""


class Prefetch(Protocol):
    """Parameters that a step leaves on their way to other nodes, as the step sees them."""

    def order(self) -> Sequence[BucketPlan] | None:
        """Return the buckets in the order in which to send them, or None to wait in the step."""
        ...

    def send(self, plans: Sequence[BucketPlan]) -> None:
        """Send parameters that a step has updated from now on. Collective: every rank."""
        ...

    def finish(self) -> None:
        """Wait until all parameters are here.

        Raises:
            CallOrderError: This rank's user has written to one on its way.
            RankFailureError: A rank was lost, or did not respond for ``policy.timeout_s``.
        """
        ...

    def require_read(self) -> None:
        """Raise if a parameter is used in a way that nobody sees.

        Raises:
            HyperparamsError: It has a gradient, and no module that owns it was called.
        """
        ...

    def grads_zeroed(self) -> None:
        """Note that all gradients are about to be zeroed."""
        ...

    def order_digest(self) -> int:
        """Return a digest of the order in which the last forward has needed buckets."""
        ...

    def start_step(self, *, is_same_order: bool) -> None:
        """Get ready for the next forward.

        Args:
            is_same_order: Whether ``order_digest`` was the same on all ranks.
        """
        ...

    def finish_copies(self) -> None:
        """Wait until all parameters are here if views of them are about to copy some."""
        ...

    def free(self) -> None:
        """Wait for nothing any more."""
        ...


class NoPrefetch:
    """A step ends when all parameters have arrived; see ``Prefetch``."""

    def order(self) -> Sequence[BucketPlan] | None:
        """See ``Prefetch.order``."""
        return None

    def send(self, plans: Sequence[BucketPlan]) -> None:
        """See ``Prefetch.send``."""

    def finish(self) -> None:
        """See ``Prefetch.finish``."""

    def require_read(self) -> None:
        """See ``Prefetch.require_read``."""

    def grads_zeroed(self) -> None:
        """See ``Prefetch.grads_zeroed``."""

    def order_digest(self) -> int:
        """See ``Prefetch.order_digest``."""
        return NO_ORDER

    def start_step(self, *, is_same_order: bool) -> None:
        """See ``Prefetch.start_step``."""

    def finish_copies(self) -> None:
        """See ``Prefetch.finish_copies``."""

    def free(self) -> None:
        """See ``Prefetch.free``."""


class ForwardPrefetch:
    """Leaves parameters to the progress thread at the end of a step, and waits in forward.

    [Note: parameters on their way]
    A step updates this rank's shards and returns; the all-gather goes on in the progress thread, a
    bucket after the other in the order in which the last forward has needed them. Each rank shows
    its node how many buckets have arrived in its lane. Before a module runs, its hook waits until
    the buckets with the module's parameters have arrived in all lanes. Such a wait needs nothing of
    other ranks but their progress threads, so ranks may wait in any order or not at all. All calls
    of ours that look at parameters wait for the whole, the next step first of all.

    In stage 2 hooks of the next backward exchange gradients beside the thread, which may still send
    parameters that no forward has needed. They share nothing but the transport, where tags tell
    their messages apart. Once all parameters have arrived the thread rests until the next step.

    Nobody sees who else reads a parameter: ``wait_params`` is for such readers. A gradient that
    backward has made for a parameter none of whose modules was called gives one away, and the step
    raises. A write to a parameter on its way would copy the page, whose other elements may not have
    arrived: the first wait for a bucket finds such pages, takes the write back, and raises.

    Torch does not see parameters arrive, as it does not see the kernel's writes. Its counters of
    versions are raised when the step ends, before anything that a later forward could save: a
    module runs and saves its parameters once they have all arrived, and they stay as they are until
    the next step, which raises the counters again. What an earlier forward has saved is refused by
    the first raise, whether the values have arrived or not.

    Where pages of the view are to be copied rather than dropped, as users write to them step after
    step, or may have been written as far as anybody knows, the step waits for the parameters; so it
    does when users have changed any.

    Implements ``Prefetch``.

    Args:
        collectives: For waits.
        registry: This rank's parameters.
        memory: Their memory.
        sync: Sends them.
        thread: Keeps them moving.
        policy: Has the longest wait.
    """

    def __init__(
        self,
        collectives: Collectives,
        registry: Registry[Any],
        memory: Memory,
        sync: BucketSync,
        thread: ProgressThread,
        policy: ShardPolicy,
    ) -> None:
        self._thread = thread
        self._collectives = collectives
        self._registry = registry
        self._memory = memory
        self._sync = sync
        self._policy = policy
        self._pid = os.getpid()
        self._partition: Partition | None = None  # that the following belong to
        self._buckets_of: dict[int, list[int]] = {}  # a module, by id of its parameters
        self._order: list[int] = []  # buckets, as far as all ranks need them in the same order
        self._needed: dict[int, None] = {}  # buckets in the order of this forward
        self._called: set[int] = set()  # modules in this forward, by id of their parameters
        self._read: set[int] = set()  # their parameters, by id
        self._reached: set[int] = set()  # the parameters that backward has reached, by id
        self._places: dict[int, int] = {}  # of the buckets that nobody has waited for
        self._num_here = 0  # buckets that have arrived in all lanes

    # -- in forward --------------------------------------------------------------------------------

    def need(self, params: Sequence[Any]) -> None:
        """Wait for the parameters of a module that is about to run.

        Args:
            params: They, always the same object.

        Raises:
            CallOrderError: See ``Prefetch.finish``.
            RankFailureError: Likewise.
        """
        if id(params) in self._called:
            return
        buckets = self._find(params)
        self._wait([bucket for bucket in buckets if bucket in self._places])
        self._needed.update(dict.fromkeys(buckets))
        self._read.update(map(id, params))
        self._called.add(id(params))

    def _find(self, params: Sequence[Any]) -> list[int]:
        """Return the buckets that hold the parameters of a module."""
        registry = self._registry
        if not self._is_current:
            self._partition = registry.partition
            self._buckets_of.clear()
            self._order.clear()
            self._needed.clear()
        buckets = self._buckets_of.get(id(params))
        if buckets is None:
            indices = {i for param in params if (i := registry.index_of(param)) is not None}
            buckets = registry.partition.buckets_of(mask_of(indices))
            self._buckets_of[id(params)] = buckets
        return buckets

    @property
    def _is_current(self) -> bool:
        """Whether numbers of buckets mean what they have meant in this rank's last forward."""
        return self._partition is self._registry.partition

    def reach(self, param: Any) -> None:
        """Note that backward has computed a gradient of a parameter."""
        self._reached.add(id(param))

    def grads_zeroed(self) -> None:
        """See ``Prefetch.grads_zeroed``."""
        self._reached.clear()

    def require_read(self) -> None:
        """See ``Prefetch.require_read``."""
        if unseen := self._reached - self._read:
            names = [b.name for b in self._registry.bindings if id(b.param) in unseen]
            raise HyperparamsError(
                f"policy.prefetch_params must be False if parameters are read without a call of "
                f"the module that owns them; got a gradient of {names[0]!r}, whose module was not "
                "called since the last step. It might be read while it is on its way. Call the "
                "module, or leave prefetch_params out."
            )

    # -- around a step -----------------------------------------------------------------------------

    def order(self) -> Sequence[BucketPlan] | None:
        """See ``Prefetch.order``; what no forward has needed comes last."""
        reduction = self._sync.reduction
        plans = {plan.bucket: plan for plan in reduction.plans if reduction.is_active(plan)}
        known = self._order if self._is_current else []
        return [
            plans[number] for number in dict.fromkeys([*known, *sorted(plans)]) if number in plans
        ]

    def send(self, plans: Sequence[BucketPlan]) -> None:
        """See ``Prefetch.send``."""
        assert not self._places
        self._num_here = 0
        self._places = {plan.bucket: place for place, plan in enumerate(plans)}
        self._thread.send_params(plans)

    def finish(self) -> None:
        """See ``Prefetch.finish``."""
        self._wait(list(self._places))

    def order_digest(self) -> int:
        """See ``Prefetch.order_digest``."""
        if not self._needed or not self._is_current:
            return NO_ORDER
        return xxhash.xxh3_64_intdigest(repr(list(self._needed)).encode()) >> 2

    def start_step(self, *, is_same_order: bool) -> None:
        """See ``Prefetch.start_step``."""
        if is_same_order and self._needed and self._is_current:
            self._order = list(self._needed)
        self._needed.clear()
        self._called.clear()
        self._read.clear()
        self._reached.clear()

    def finish_copies(self) -> None:
        """See ``Prefetch.finish_copies``."""
        views = [self._memory.params_of(region)[1] for region in range(len(self._memory.buffers))]
        if self._places and any(view.copies_shared for view in views):
            self._wait_here(len(self._places) - 1)
            self._places.clear()

    def free(self) -> None:
        """See ``Prefetch.free``."""
        self._places.clear()
        self._registry.adapter.on_params_needed(None)

    # -- inside ------------------------------------------------------------------------------------

    def _wait(self, buckets: Sequence[int]) -> None:
        """Wait until some of the buckets on their way have arrived in all lanes."""
        if not buckets:
            return
        last = max(self._places[bucket] for bucket in buckets)
        if last >= self._num_here:
            self._wait_here(last)
        found = [name for bucket in buckets for name in self._undo_writes(bucket)]
        written = list(dict.fromkeys(found))
        for bucket in buckets:
            del self._places[bucket]
        if written:
            raise CallOrderError(
                f"parameters must not be written to while they are on their way between nodes; got "
                f"a write to {' or '.join(map(repr, written))} after step() and before the module "
                "that owns it was called. The write was taken back. Call opt.wait_params() first."
            )

    def _wait_here(self, place: int) -> None:
        """Wait until the bucket at a place, and those before it, have arrived in all lanes."""
        thread = self._thread

        def has_landed() -> bool:
            self._num_here = min(thread.num_landed())
            return self._num_here > place

        def is_here() -> bool:
            thread.work()
            if thread.error is not None:
                raise thread.error
            return has_landed()

        def late() -> list[int]:
            behind = [i for i, number in enumerate(thread.num_landed()) if number <= place]
            topology = self._collectives.topology
            ranks = [r for r, p in enumerate(topology.places) if p[0] == topology.node]
            others = {ranks[i] for i in behind} - {topology.rank}
            return sorted({*others, *self._sync.params_awaited()})

        if has_landed():
            return
        start = time.perf_counter()
        if not mpi_is_usable(self._pid):  # in a forked child, or while the process ends
            self._wait_for_parent(has_landed)
            return
        with thread.borrowed():
            self._collectives.wait(is_here, self._sync.step, "parameters", late)
        self._sync.waited_s += time.perf_counter() - start

    def _wait_for_parent(self, has_landed: Any) -> None:
        """Wait without MPI: the threads of the ranks do the work.

        Raises:
            RankFailureError: It takes too long.
        """
        if not wait_briefly(has_landed, self._policy.timeout_s):
            raise RankFailureError(
                f"parameters did not arrive within {self._policy.timeout_s:g} s in a process that "
                "may not use MPI. Look for a rank that died or hangs, or raise policy.timeout_s."
            )

    def _undo_writes(self, number: int) -> list[str]:
        """Take back what this rank's user has written in a bucket; return whose it is."""
        partition = self._registry.partition
        bucket = partition.buckets[number]
        array, view = self._memory.params_of(bucket.region)
        start = partition.regions[bucket.region].start
        local = array.bytes_of(Span(bucket.start, bucket.stop).shift(-start))
        pages = Span(
            local.start // PAGE_NBYTES * PAGE_NBYTES, -(-local.stop // PAGE_NBYTES) * PAGE_NBYTES
        )
        if not (spans := view.find_written(pages)):
            return []
        near = [index for index, _ in partition.params_in(bucket.region, bucket)]
        bindings = [self._registry.bindings[index] for index in near]
        names = [b.name for b in bindings if b.own_data.tobytes() != b.data.tobytes()]
        view.undo(spans)
        return names or [bindings[0].name]


def make_prefetch(
    collectives: Collectives,
    registry: Registry[Any],
    memory: Memory,
    sync: BucketSync,
    overlap: Overlap,
    policy: ShardPolicy,
) -> Prefetch:
    """Set up the prefetch of parameters, if the policy asks for it and there are other nodes.

    Args:
        collectives: For waits.
        registry: This rank's parameters.
        memory: Their memory.
        sync: Sends them.
        overlap: Beside backward.
        policy: How to shard; it can be had.
    """
    has_others = collectives.topology.num_nodes > 1
    if policy.prefetch_params and has_others and overlap.thread is not None:
        prefetch = ForwardPrefetch(collectives, registry, memory, sync, overlap.thread, policy)
        registry.adapter.on_params_needed(prefetch)
        return prefetch
    return NoPrefetch()
