"""Copies between a device and node memory: around the updates of a step, or beside them."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Protocol

from shardopt.backends.base import Device, Event
from shardopt.comm.flags import NodeFlags
from shardopt.comm.node_memory.fence import full_fence
from shardopt.comm.topology import Topology
from shardopt.layout.partition import Partition
from shardopt.layout.span import Span
from shardopt.store.buffers import ShardBuffers
from shardopt.store.memory import Memory

_LANDED, _UPDATED, _NUM_FIELDS = 0, 1, 2


class Copies(Protocol):
    """Brings gradients to where the kernel reads them, and parameters to where frameworks do.

    Parameters are given as bit masks. A *round* begins when ranks have agreed that the gradients
    sent last are to be summed, and ends before they meet again.

    Attributes:
        are_beside: Whether copies go on while the kernel updates, so that it should stop for a look
            at them now and then.
        ranks: The ranks of the node, by node rank.
    """

    are_beside: bool
    ranks: Sequence[int]

    def extend(self, partition: Partition, buffers: Sequence[ShardBuffers]) -> None:
        """Prepare for the buckets of another partition."""
        ...

    def send_grads(self, used: int, present: int) -> None:
        """Copy this rank's gradients, or begin to, before ranks agree; may be called again.

        Args:
            used: The parameters whose gradients are in use; those of all others are zero.
            present: The parameters that have a gradient on this rank; it is zero for the others.
        """
        ...

    def keep_grads(self) -> None:
        """Have the device write to this rank's gradients only once they are copied."""
        ...

    def begin(self, present: int) -> None:
        """Begin a round, with the parameters that have a gradient on some rank."""
        ...

    def has_landed(self, bucket: int) -> bool:
        """Whether this rank's gradients are where the kernel reads them; makes progress."""
        ...

    def have_all_landed(self) -> bool:
        """Whether those of all buckets are, and others know; makes progress."""
        ...

    def is_home(self, bucket: int) -> bool:
        """Whether those of all ranks of the node are, and may be read; makes progress."""
        ...

    def begin_update(self, updated: int, written: int) -> None:
        """Begin the way back of what this round updates, and of what users have written to."""
        ...

    def note_updated(self, bucket: int) -> None:
        """Note that this rank's shards of all buckets up to this one are updated."""
        ...

    def note_all_updated(self) -> None:
        """Note that all shards of this rank are."""
        ...

    def advance(self) -> bool:
        """Make progress without waiting; whether no update of another rank is waited for."""
        ...

    def show_params(self) -> None:
        """Have the parameters where this rank's framework reads them, once all ranks have met."""
        ...

    def show_grads(self, params: int) -> None:
        """Copy averaged gradients to where this rank's framework has them."""
        ...

    @property
    def late(self) -> tuple[int, list[int]]:
        """The bucket that is at home next, and the node ranks whose gradients are missing."""
        ...

    @property
    def not_updated(self) -> tuple[int, list[int]]:
        """The bucket that is complete next, and the node ranks that have not updated it."""
        ...

    def free(self) -> None:
        """Wait until nothing is in transit, and release all memory."""
        ...


class CopiesAround:
    """All copies are made before ranks meet, or after; on CPUs there are none. See ``Copies``.

    Args:
        memory: Of this rank.
        ranks: The ranks of the node.
    """

    are_beside = False

    def __init__(self, memory: Memory, ranks: Sequence[int]) -> None:
        self.ranks = ranks
        self._memory, self._residence = memory, memory.residence
        self._updated = 0
        self._partition: Partition | None = None

    def extend(self, partition: Partition, buffers: Sequence[ShardBuffers]) -> None:
        """See ``Copies.extend``."""
        self._partition = partition

    def send_grads(self, used: int, present: int) -> None:
        """See ``Copies.send_grads``."""
        if not self._residence.is_home:
            self._residence.send_grads(self._spans(used))

    def keep_grads(self) -> None:
        """See ``Copies.keep_grads``."""

    def begin(self, present: int) -> None:
        """See ``Copies.begin``."""

    def has_landed(self, bucket: int) -> bool:
        """See ``Copies.has_landed``."""
        return True

    def have_all_landed(self) -> bool:
        """See ``Copies.have_all_landed``."""
        return True

    def is_home(self, bucket: int) -> bool:
        """See ``Copies.is_home``."""
        return True

    def begin_update(self, updated: int, written: int) -> None:
        """See ``Copies.begin_update``; others' shards of what is written need no copy."""
        self._updated = updated

    def note_updated(self, bucket: int) -> None:
        """See ``Copies.note_updated``."""

    def note_all_updated(self) -> None:
        """See ``Copies.note_all_updated``."""

    def advance(self) -> bool:
        """See ``Copies.advance``."""
        return True

    @property
    def late(self) -> tuple[int, list[int]]:
        """See ``Copies.late``."""
        return 0, []

    @property
    def not_updated(self) -> tuple[int, list[int]]:
        """See ``Copies.not_updated``."""
        return 0, []

    def show_params(self) -> None:
        """See ``Copies.show_params``."""
        if not self._residence.is_home:
            self._residence.show_params(self._spans(self._updated))

    def show_grads(self, params: int) -> None:
        """See ``Copies.show_grads``."""
        if not self._residence.is_home:
            self._residence.show_grads(self._spans(params))

    def free(self) -> None:
        """See ``Copies.free``."""

    def _spans(self, params: int) -> Sequence[Sequence[Span]]:
        """Return the spans of some parameters for each region."""
        if self._partition is None:  # no parameters yet
            return []
        return self._memory.local_runs(self._partition, params)


class CopiesBeside(CopiesAround):
    """Copies go both ways while the CPUs of a node update what its devices have offloaded.

    [Note: copies beside updates]
    On one node, offloaded updates are a pipeline of three streams of work: while the kernel updates
    bucket i, the gradients of bucket i + 1 come down and the parameters of bucket i - 1 go up, each
    way in a queue of its own. A bucket is updated once *all* ranks of the node have announced that
    its gradients are at home, and a rank copies it up once all have announced that their shards of
    it are updated. Ranks announce how many buckets they have come to in this round, in the order of
    buckets. Only ranks that have agreed begin a round, all of them the same one, so no announcement
    of an older round counts. Before a norm is known all gradients must be at home; then only the
    way up runs beside the update.

    The rest is order. The way down forks from the device's own work, and that has joined the way up
    of the last step: a rank that announces a bucket reads no more of the parameters that others are
    about to write. The way up forks from it, too: backward has read what is overwritten.

    Fewer bytes travel than there are. Down go the gradients that are present on this rank, and
    zeros where its row at home may hold something else: what was present on some rank in the last
    round, as averages and sums of gradients are written there. Up go the parameters that are
    updated, as they have a gradient on some rank, and those that users have written to.

    Collective over the node: construction.

    Args:
        device: Holds parameters and gradients.
        memory: Of this rank.
        ranks: The ranks of the node.
    """

    are_beside = True

    def __init__(self, device: Device, memory: Memory, ranks: Sequence[int]) -> None:
        super().__init__(memory, ranks)
        self._down, self._up = device.copy_queue(), device.copy_queue()
        self._flags = NodeFlags(memory.arena, _NUM_FIELDS)
        self._round = 0
        self._buffers: list[ShardBuffers] = []  # of each bucket
        self._cut: Callable[[int], list[list[Span]]] = lambda params: []
        self._not_zero = -1  # the parameters whose gradients at home may be something else
        self._landing: deque[Event] = deque()  # one for each bucket
        self._last_events: list[Event] = []
        self._num_landed = 0  # buckets of this rank
        self._num_home = 0  # buckets of all ranks
        self._rising: list[list[Span]] = []  # for each bucket
        self._num_shown = 0

    def extend(self, partition: Partition, buffers: Sequence[ShardBuffers]) -> None:
        """See ``Copies.extend``."""
        super().extend(partition, buffers)
        self._settle()
        self._buffers = [buffers[bucket.region] for bucket in partition.buckets]
        self._cut = lru_cache(maxsize=4)(partial(_cut, partition))  # masks seldom change
        self._not_zero = -1  # the numbers of parameters may have changed

    # -- down --------------------------------------------------------------------------------------

    def send_grads(self, used: int, present: int) -> None:
        """See ``Copies.send_grads``."""
        params = used & (present | self._not_zero)
        self._not_zero |= present
        self._landing.clear()
        self._down.fork()
        for buffers, spans in zip(self._buffers, self._cut(params), strict=True):
            for span in spans:
                self._down.copy(buffers.row[span.slice], buffers.grads[span.slice])
            self._landing.append(self._down.event())

    def keep_grads(self) -> None:
        """See ``Copies.keep_grads``."""
        self._down.join()

    def begin(self, present: int) -> None:
        """See ``Copies.begin``."""
        self._round += 1
        self._not_zero = present
        self._num_landed = self._num_home = 0

    def has_landed(self, bucket: int) -> bool:
        """See ``Copies.has_landed``."""
        num_landed = self._num_landed
        while self._landing and self._landing[0].is_done():
            self._landing.popleft()
            self._num_landed += 1
        if self._num_landed > num_landed:
            self._announce(_LANDED, self._num_landed)
        return bucket < self._num_landed

    def have_all_landed(self) -> bool:
        """See ``Copies.have_all_landed``."""
        self.has_landed(0)
        return not self._landing

    def is_home(self, bucket: int) -> bool:
        """See ``Copies.is_home``."""
        if bucket < self._num_home:
            return True
        self.advance()
        self._num_home = min(self._announced(_LANDED))
        return bucket < self._num_home

    @property
    def late(self) -> tuple[int, list[int]]:
        """See ``Copies.late``."""
        return self._last(_LANDED)

    # -- up ----------------------------------------------------------------------------------------

    def begin_update(self, updated: int, written: int) -> None:
        """See ``Copies.begin_update``."""
        self._rising, self._num_shown = self._cut(updated | written), 0
        self._up.fork()

    def note_updated(self, bucket: int) -> None:
        """See ``Copies.note_updated``."""
        self._announce(_UPDATED, bucket + 1)

    def note_all_updated(self) -> None:
        """See ``Copies.note_all_updated``."""
        self._announce(_UPDATED, len(self._buffers))

    def advance(self) -> bool:
        """See ``Copies.advance``."""
        self.has_landed(0)
        if self._num_shown < len(self._rising):
            self._show(min(self._announced(_UPDATED)))
        return self._num_shown == len(self._rising)

    def show_params(self) -> None:
        """See ``Copies.show_params``."""
        self._show(len(self._rising))
        self._rising, self._num_shown = [], 0
        self.keep_grads()  # where a step is skipped nobody has waited for them
        self._up.join()
        self._residence.note_shown()
        self._last_events = [self._down.event(), self._up.event()]

    @property
    def not_updated(self) -> tuple[int, list[int]]:
        """See ``Copies.not_updated``."""
        return self._last(_UPDATED)

    def _show(self, stop: int) -> None:
        """Copy the parameters of the first ``stop`` buckets up, unless they are on their way."""
        for bucket in range(self._num_shown, stop):
            buffers = self._buffers[bucket]
            for span in self._rising[bucket]:
                self._up.copy(buffers.own_params[span.slice], buffers.params[span.slice])
        self._num_shown = max(stop, self._num_shown)

    # -- inside ------------------------------------------------------------------------------------

    def free(self) -> None:
        """See ``Copies.free``."""
        self._settle()
        self._buffers, self._cut = [], lambda params: []

    def _announce(self, field: int, num_buckets: int) -> None:
        """Show the ranks of the node how far this one has come in this round."""
        full_fence()  # what it announces comes first; see [Note: when stores become visible]
        self._flags.mine[field] = self._round << 32 | num_buckets
        self._flags.publish()

    def _announced(self, field: int) -> list[int]:
        """Return how far each rank has come; what they announce can be read."""
        self._flags.acquire()
        announced = self._flags.all[:, field].tolist()
        full_fence()
        return [each & 0xFFFFFFFF if each >> 32 == self._round else 0 for each in announced]

    def _last(self, field: int) -> tuple[int, list[int]]:
        """Return the bucket that some ranks have not come to, and these ranks."""
        announced = self._announced(field)
        bucket = min(announced)
        return bucket, [rank for rank, number in enumerate(announced) if number == bucket]

    def _settle(self) -> None:
        """Wait until nothing is in transit."""
        for event in (*self._landing, *self._last_events):
            event.wait()
        self._landing.clear()
        self._last_events.clear()


def make_copies(topology: Topology, memory: Memory) -> Copies:
    """Return the copies of this rank: beside updates if those are offloaded, on one node.

    Collective over the node.
    """
    device, ranks = memory.residence.offloaded, topology.node_ranks
    if device is None or topology.num_nodes > 1:
        return CopiesAround(memory, ranks)
    return CopiesBeside(device, memory, ranks)


def _cut(partition: Partition, params: int) -> list[list[Span]]:
    """Return for each bucket the spans of some parameters, counted from the start of the region."""
    regions = partition.regions
    runs = [partition.runs(index, params) for index in range(len(regions))]
    return [
        [
            part.shift(-regions[bucket.region].start)
            for run in runs[bucket.region]
            if (part := run.intersect(bucket))
        ]
        for bucket in partition.buckets
    ]
