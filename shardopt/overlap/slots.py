"""The buffers of a ring, in memory that the ranks of a node share."""

from collections.abc import Sequence

import numpy as np

from shardopt._typing import FloatArray, IntArray
from shardopt.backends.base import Rows
from shardopt.layout.partition import Partition
from shardopt.layout.ring import RingPlan
from shardopt.store.memory import Memory

_MOST_ROWS = 256  # that are kept, of all combinations of buffers


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
        self._node_rank = memory.arena.comm.rank
        self._of_rank[self._node_rank][:] = 0  # memory that is reported is there, and near its core
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
        self._arrays: dict[tuple[int, int, int], FloatArray] = {}
        self._full_rows: dict[tuple[tuple[int, ...], int], Rows] = {}
        self.gaps: list[IntArray] = []
        for number in buckets:
            bucket = partition.buckets[number]
            is_gap = np.ones(bucket.numel, np.bool_)
            for _, span in partition.params_in(bucket.region, bucket):
                is_gap[span.shift(-bucket.start).slice] = False
            self.gaps.append(np.flatnonzero(is_gap))

    def mine(self, slot: int, place: int) -> FloatArray:
        """Return a buffer of this rank, as the bucket at a place has it."""
        return self._array(self._node_rank, slot, self._kind_of[place])

    def all_rows(self, slots: tuple[int, ...], place: int) -> Rows:
        """Return a buffer of each rank, as the bucket at a place has them."""
        key = slots, self._kind_of[place]
        if key not in self._full_rows:
            if len(self._full_rows) >= _MOST_ROWS:
                self._full_rows.clear()
            arrays = [self._array(rank, slot, key[1]) for rank, slot in enumerate(slots)]
            self._full_rows[key] = Rows.of(*arrays)
        return self._full_rows[key]

    def rows(self, slots: tuple[int, ...], place: int, filled: Sequence[bool]) -> Rows:
        """Return the same, and zeros for those ranks whose buffers are not filled."""
        if all(filled):
            return self.all_rows(slots, place)
        kind = self._kind_of[place]
        numel, dtype = self._kinds[kind]
        zeros = self._zeros[: numel * dtype.itemsize].view(dtype)
        ranks = zip(slots, filled, strict=True)
        return Rows.of(
            *[
                self._array(rank, slot, kind) if is_filled else zeros
                for rank, (slot, is_filled) in enumerate(ranks)
            ]
        )

    def _array(self, rank: int, slot: int, kind: int) -> FloatArray:
        key = rank, slot, kind
        if key not in self._arrays:
            numel, dtype = self._kinds[kind]
            memory = self._of_rank[rank][slot, : numel * dtype.itemsize]
            self._arrays[key] = memory.view(dtype)
        return self._arrays[key]
