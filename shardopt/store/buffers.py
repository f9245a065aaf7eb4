"""The parameters and gradients of one region, in memory that the ranks of a node share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shardopt.backends.base import Rows
from shardopt.layout.dtypes import has_master
from shardopt.layout.padding import PAGE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardopt._typing import FloatArray
    from shardopt.layout.partition import DtypeRegion, Partition, PlacedParam, Shard
    from shardopt.layout.span import Span


@dataclass(frozen=True, slots=True, eq=False)
class RegionArrays:
    """The arrays of a region in the memory of a node.

    Attributes:
        params: [region_numel], one copy on the node.
        own_params: [region_numel] the same, as this rank may write to it.
        grads: [region_numel] each, one for each rank of the node.
        sums: [node_numel] the sums over all nodes of gradients of the node's shards; empty on a
            single node.
    """

    params: FloatArray
    own_params: FloatArray
    grads: Sequence[FloatArray]
    sums: FloatArray


class ShardBuffers:
    """The parameters and gradients of one region, as this rank sees them.

    Args:
        partition: The layout.
        index: Number of the region.
        place: The node and node rank of this rank.
        arrays: The memory.

    Attributes:
        region: Its place in the flat index space.
        shards: The shards this rank owns, one per bucket.
        params: [region_numel], one copy on the node.
        own_params: [region_numel] the same, as this rank may write to it; see
            [Note: weights that behave as in DDP].
        grads: [region_numel], this rank's gradients.
        all_grads: The gradients of all ranks of the node.
        node_grads: [region_numel] each, the same as arrays.
        sums: [node_numel] gradients of the node's shards, summed over all nodes; empty on a single
            node, where the kernel reads them in place.
    """

    def __init__(
        self, partition: Partition, index: int, place: tuple[int, int], arrays: RegionArrays
    ) -> None:
        self.region: DtypeRegion
        self.shards: tuple[Shard, ...]
        self.place(partition, index, place)
        self.params = arrays.params
        self.own_params = arrays.own_params
        self.grads = arrays.grads[place[1]]
        self.all_grads = Rows.of(*arrays.grads)
        self.node_grads = arrays.grads
        self.sums = arrays.sums
        self._targets = Rows.of(self.params)
        self._touch_first()

    def place(self, partition: Partition, index: int, place: tuple[int, int]) -> None:
        """Note where the region is, in a partition that has just been made or rearranged."""
        self.region = partition.regions[index]
        self.shards = partition.shards(*place, index)

    @property
    def owned_numel(self) -> int:
        """Elements that this rank owns."""
        return sum(shard.numel for shard in self.shards)

    @property
    def holds_sums(self) -> bool:
        """Whether the dtype of gradients can hold their sum over ranks."""
        return not has_master(self.region.dtype)

    def local(self, span: Span) -> Span:
        """Return a span of the flat index space counted from the start of the region."""
        return span.shift(-self.region.start)

    def targets(self, span: Span) -> Rows:
        """Return the copies of the parameters in a span of the flat index space."""
        return self._targets.part(self.local(span))

    def sources(self, span: Span) -> Rows:
        """Return the gradients of all ranks of the node in a span of the flat index space."""
        return self.all_grads.part(self.local(span))

    def node_param(self, param: PlacedParam) -> FloatArray:
        """Return the node's copy of a parameter, in its own shape."""
        return self.params[self.local(param).slice].reshape(param.spec.shape)

    def own_param(self, param: PlacedParam) -> FloatArray:
        """Return a parameter as this rank may write to it, in its own shape."""
        return self.own_params[self.local(param).slice].reshape(param.spec.shape)

    def own_grad(self, param: PlacedParam) -> FloatArray:
        """Return this rank's gradient of a parameter, in its own shape."""
        return self.grads[self.local(param).slice].reshape(param.spec.shape)

    def free(self) -> None:
        """Release all memory but that of the parameters, which users may hold."""
        del self.params, self.own_params, self.sums, self._targets
        del self.grads, self.all_grads, self.node_grads

    def _touch_first(self) -> None:
        """Write to each part from the rank that will update it: its pages are near its core."""
        for shard in self.shards:
            self.params[self.local(shard).slice].view(np.uint8)[::PAGE_NBYTES] = 0
