"""Gradients to the owners of their shards and updated shards back, bucket by bucket."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardopt._typing import FloatArray
from shardopt.backends.base import Kernel
from shardopt.layout.dtypes import wire_dtype_of
from shardopt.layout.partition import CHUNK_NUMEL, Partition, Shard
from shardopt.layout.traffic import NUM_SLOTS, row_numel_between_nodes, sends_grads
from shardopt.store.buffers import ShardBuffers
from shardopt.transport.lane import Lane, Transfer

_MOST_PUBLISHED = 4  # buckets of parameters under way at a time
_GRADS, _PARAMS = 1, 2  # tags


@dataclass(frozen=True)
class BucketPlan:
    """One bucket, as the ranks of this lane see it.

    Attributes:
        bucket: Its number in the partition.
        storage: Its region's memory.
        shard: What this rank owns of it.
        cuts: [num_nodes + 1] where the nodes' shards begin, counted from the start of the region.
        wire_dtype: What the sums of its gradients travel in.
    """

    bucket: int
    storage: ShardBuffers
    shard: Shard
    cuts: tuple[int, ...]
    wire_dtype: str

    def part(self, node: int) -> slice:
        """The shard of a node in the arrays of the region."""
        return slice(self.cuts[node], self.cuts[node + 1])

    @property
    def numel(self) -> int:
        """Elements of the lane part."""
        return self.cuts[-1] - self.cuts[0]

    @property
    def sends_grads(self) -> bool:
        """See ``planner.sends_grads``."""
        return sends_grads(self.storage.region.dtype, len(self.storage.grads), self.wire_dtype)


def plan_buckets(
    partition: Partition, buffers: Sequence[ShardBuffers], lane: Lane, wire_dtype: str | None
) -> list[BucketPlan]:
    """Lay out all buckets in the order in which they travel: as backward tends to finish them."""
    routes = []
    shards = {storage.region.start: iter(storage.shards) for storage in buffers}
    for number, bucket in enumerate(partition.buckets):
        storage = buffers[bucket.region]
        zero = storage.region.start
        cuts = partition.lane_cuts(bucket, storage.node_rank)
        wire = wire_dtype_of(storage.region.dtype, partition.node_size, wire_dtype)
        positions = tuple(start - zero for start in cuts)
        routes.append(BucketPlan(number, storage, next(shards[zero]), positions, wire))
    return routes[::-1]


class StagingBuffer:
    """Memory for one bucket under way; it has one owner: the bucket that took it last."""

    def __init__(self, send_nbytes: int, receive_nbytes: int) -> None:
        self._send = np.empty(send_nbytes, np.uint8)
        self._receive = np.empty(receive_nbytes, np.uint8)

    def sums(self, route: BucketPlan) -> FloatArray:
        """[lane part] what this node sends."""
        return self._send[: route.numel * np.dtype(route.wire_dtype).itemsize].view(
            route.wire_dtype
        )

    def partials(self, route: BucketPlan) -> FloatArray:
        """[num_nodes, shard or more] what all nodes bring for the shard of this one."""
        itemsize = np.dtype(route.wire_dtype).itemsize
        num_rows = len(route.cuts) - 1
        row = row_numel_between_nodes(route.shard.numel, itemsize)
        nbytes = num_rows * row * itemsize
        return self._receive[:nbytes].view(route.wire_dtype).reshape(num_rows, row)


class ReduceScatter:
    """Brings the gradients of every bucket to the owners of its shards and sums them there.

    Buckets start in the order of ``queue``, which is the same on every rank, as soon as one of
    ``NUM_SLOTS`` slots is free; each call of ``advance`` does what can be done without waiting.

    Args:
        lane: The ranks to exchange with.
        kernel: What computes.

    Attributes:
        routes: All buckets in the order in which they travel.
        queue: Indices of ``routes``. One that is in it twice is exchanged twice.
        square_sums: [numel / CHUNK_NUMEL] sums of squares of the chunks that this rank owns.
    """

    def __init__(self, lane: Lane, kernel: Kernel) -> None:
        self.routes: list[BucketPlan] = []
        self.queue: list[int] = []
        self.square_sums = np.zeros(0)
        self._lane = lane
        self._kernel = kernel
        self._slots: list[StagingBuffer] = []
        self._num_started = 0
        self._num_summed = 0
        self._under_way: deque[tuple[BucketPlan, StagingBuffer, Transfer]] = deque()
        self._leaving: list[tuple[StagingBuffer, Transfer]] = []

    def lay_out(
        self, partition: Partition, routes: list[BucketPlan], slot_nbytes: tuple[int, int]
    ) -> None:
        """Prepare for other buckets; none may be under way.

        Args:
            partition: The layout.
            routes: See ``plan_buckets``.
            slot_nbytes: See ``plan_slot``.
        """
        assert not self._under_way
        self.routes = routes
        self.square_sums = np.zeros(partition.numel // CHUNK_NUMEL)
        self._slots = [StagingBuffer(*slot_nbytes) for _ in range(NUM_SLOTS)]
        self.reset()

    def reset(self) -> None:
        """Begin again with all buckets."""
        assert not self._under_way
        assert not self._leaving
        self.queue = list(range(len(self.routes)))
        self._num_started = 0
        self._num_summed = 0

    def repeat(self, stale: int) -> None:
        """ReduceScatter those of a bit mask of ``routes`` once more, after all others."""
        self.queue += [index for index in range(len(self.routes)) if stale >> index & 1]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._under_way and not self._leaving

    def is_quiet(self) -> bool:
        """Whether all messages have arrived, summed or not; makes progress."""
        transfers = [t for *_, t in self._under_way] + [t for _, t in self._leaving]
        return all([transfer.is_over() for transfer in transfers])

    @property
    def num_started(self) -> int:
        """Buckets of ``queue`` that have started."""
        return self._num_started

    def final_places(self) -> list[tuple[int, BucketPlan]]:
        """Each route with the place in ``queue`` after which its sum holds, in that order."""
        last = {index: place for place, index in enumerate(self.queue)}
        return sorted(((place, self.routes[i]) for i, place in last.items()), key=lambda x: x[0])

    def advance(self, limit: int | None = None) -> int:
        """Do what can be done without waiting.

        Args:
            limit: Start no more than so many of ``queue``; None is all.

        Returns:
            How many of ``queue`` are summed.
        """
        self._release_slots()
        while self._under_way and self._under_way[0][2].has_arrived():
            route, slot, transfer = self._under_way.popleft()
            self._sum(route, slot)
            self._leaving.append((slot, transfer))
            self._num_summed += 1
            self._release_slots()
        stop = len(self.queue) if limit is None else min(limit, len(self.queue))
        while self._slots and self._num_started < stop:
            self._start(self.routes[self.queue[self._num_started]])
            self._num_started += 1
        return self._num_summed

    @property
    def awaited(self) -> tuple[int, list[int]]:
        """The bucket that is to be summed next, and the nodes whose part is missing."""
        if not self._under_way:
            index = self.queue[min(self._num_started, len(self.queue) - 1)]
            return self.routes[index].bucket, [n for _, t in self._leaving for n in t.awaited_nodes]
        route, _, transfer = self._under_way[0]
        return route.bucket, transfer.awaited_nodes

    def _start(self, route: BucketPlan) -> None:
        """Sum the gradients of the node, piece by piece, and send each to its owner."""
        slot, lane = self._slots.pop(), self._lane
        partials = slot.partials(route)
        shard_numel = route.shard.numel
        rows = [(node, partials[node, :shard_numel]) for node in lane.others]
        transfer = Transfer([], lane.receive(rows, _GRADS))
        self._under_way.append((route, slot, transfer))
        storage = route.storage
        for node in lane.others:
            part = route.part(node)
            if route.sends_grads:
                piece = storage.grads[0, part]
            else:
                zero = route.cuts[0]
                piece = slot.sums(route)[part.start - zero : part.stop - zero]
                self._kernel.reduce(storage.grads, piece, part.start, part.stop, None)
            transfer.sends += lane.send(piece, node, _GRADS)
        own = route.part(lane.node)
        self._kernel.reduce(
            storage.grads, partials[lane.node, :shard_numel], own.start, own.stop, None
        )

    def _sum(self, route: BucketPlan, slot: StagingBuffer) -> None:
        """Sum what the nodes have brought, in their order."""
        shard, partials = route.shard, slot.partials(route)
        out = route.storage.sums[shard.local_start : shard.local_stop]
        chunks = slice(shard.start // CHUNK_NUMEL, shard.stop // CHUNK_NUMEL)
        self._kernel.reduce(partials, out, 0, shard.numel, self.square_sums[chunks])

    def _release_slots(self) -> None:
        leaving, self._leaving = self._leaving, []
        for slot, transfer in leaving:
            if transfer.is_over():
                self._slots.append(slot)
            else:
                self._leaving.append((slot, transfer))
