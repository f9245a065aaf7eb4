"""The buffers of a ring, in memory that the ranks of a node share."""

from collections.abc import Iterable, Sequence

import numpy as np

from shardopt._typing import FloatArray, IntArray
from shardopt.backends.base import Rows
from shardopt.layout.partition import Partition
from shardopt.layout.ring import RingPlan
from shardopt.store.memory import Memory


class Slots:
    """The buffers of all ranks of a node; collective over the node: construction.

    Args:
        memory: Of the node.
        partition: The layout.
        buckets: Their numbers in the order of travel.
        plan: The ring.

    Attributes:
        gaps: For each bucket, in that order, the elements that belong to no parameter.
    """

    def __init__(
        self, memory: Memory, partition: Partition, buckets: Sequence[int], plan: RingPlan
    ) -> None:
        node = memory.arena.allocate(plan.nbytes).memory
        starts = [rank * plan.rank_nbytes for rank in range(plan.node_size)]
        self._of_rank = [
            node[start : start + plan.depth * plan.slot_nbytes].reshape(plan.depth, -1)
            for start in starts
        ]
        self._node_rank, self._depth = memory.arena.comm.rank, plan.depth
        regions = [partition.regions[partition.buckets[number].region] for number in buckets]
        sizes = [
            (partition.buckets[number].numel, np.dtype(region.dtype))
            for number, region in zip(buckets, regions, strict=True)
        ]
        self._kinds = list(dict.fromkeys(sizes))  # most buckets are alike
        self._kind_of = [self._kinds.index(size) for size in sizes]  # by place
        self._zeros = np.zeros(
            plan.slot_nbytes, np.uint8
        )  # never touched, so that it takes no memory
        self._rows: dict[tuple[int, int], list[FloatArray]] = {}
        self._full_rows: dict[tuple[int, int], Rows] = {}
        self.gaps: list[IntArray] = []
        for number in buckets:
            bucket = partition.buckets[number]
            is_gap = np.ones(bucket.numel, np.bool_)
            for _, span in partition.params_in(bucket.region, bucket):
                is_gap[span.shift(-bucket.start).slice] = False
            self.gaps.append(np.flatnonzero(is_gap))

    def mine(self, position: int, place: int) -> FloatArray:
        """Return this rank's buffer for a position, as the bucket at a place has it."""
        return self._arrays(position % self._depth, self._kind_of[place])[self._node_rank]

    def rows(self, position: int, place: int, filled: Iterable[bool]) -> Rows:
        """Return the buffers of all ranks, and zeros for those that are not filled."""
        key = position % self._depth, self._kind_of[place]
        arrays, is_filled = self._arrays(*key), list(filled)
        if not all(is_filled):
            zeros = self._zeros[: arrays[0].nbytes].view(arrays[0].dtype)
            pairs = zip(arrays, is_filled, strict=True)
            return Rows.of(*[array if has else zeros for array, has in pairs])
        if key not in self._full_rows:
            self._full_rows[key] = Rows.of(*arrays)
        return self._full_rows[key]

    def _arrays(self, slot: int, kind: int) -> list[FloatArray]:
        key = slot, kind
        if key not in self._rows:
            numel, dtype = self._kinds[kind]
            nbytes = numel * dtype.itemsize
            self._rows[key] = [slots[slot, :nbytes].view(dtype) for slots in self._of_rank]
        return self._rows[key]
