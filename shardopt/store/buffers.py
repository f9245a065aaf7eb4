"""The parameters and gradients of one region, in memory that the ranks of a node share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shardopt.backends.base import Rows
from shardopt.backends.codes import part_of
from shardopt.layout.padding import PAGE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shardopt._typing import FloatArray
    from shardopt.layout.partition import DtypeRegion, Partition, PlacedParam, Shard
    from shardopt.layout.span import Span


class ShardArrays:
    """Arrays whose elements belong to shards, such as the state of a region, and sums of gradients.

    Args:
        arrays: By key; [node_numel] each, with all shards of the node in flat order as
            ``Shard.local`` has them, or [owned_numel], with those of one rank end to end. Or a
            function that allocates them, to be called when the first of them is needed.
        owned: The shards of that rank; None for all of the node.
    """

    def __init__(
        self,
        arrays: Mapping[str, FloatArray] | Callable[[], Mapping[str, FloatArray]],
        owned: Sequence[Shard] | None,
    ) -> None:
        self._arrays = arrays
        self._starts: dict[int, int] | None = None
        if owned is not None:
            shards = [shard for shard in owned if shard]
            starts = itertools.accumulate((shard.numel for shard in shards), initial=0)
            # A region may move in the flat index space, but not a shard in the state of its node.
            self._starts = dict(zip((shard.local_start for shard in shards), starts, strict=False))

    @property
    def arrays(self) -> Mapping[str, FloatArray]:
        """The arrays, allocated if they were not yet."""
        if callable(self._arrays):
            self._arrays = self._arrays()
        return self._arrays

    @property
    def is_allocated(self) -> bool:
        """Whether the arrays are there; else all of them are zeros."""
        return not callable(self._arrays)

    def place(self, shard: Shard, local: Span | None = None) -> Span:
        """Return where a shard is in the arrays.

        Args:
            shard: The shard.
            local: Part of it, as ``Shard.local`` counts; None for all.
        """
        local = shard.local if local is None else local
        if self._starts is None:
            return local
        return local.shift(self._starts.get(shard.local_start, 0) - shard.local_start)

    def part(self, shard: Shard, local: Span | None = None) -> dict[str, FloatArray]:
        """Return a shard, or part of it, of each array; see ``place``."""
        here = self.place(shard, local)
        return {key: part_of(array, here) for key, array in self.arrays.items()}


@dataclass(frozen=True, slots=True, eq=False)
class RegionArrays:
    """The parameters and gradients of a region, and the sums of its shards.

    Attributes:
        params: [region_numel], the node's copy, in node memory.
        own_params: [region_numel] the parameters that this rank's framework holds.
        own_grads: [region_numel] its gradients.
        rows: [region_numel] each, the gradients of all ranks of the node, that the kernel reads; or
            one row of their averages.
        targets: [region_numel] each, the copies of the parameters that the kernel writes; it reads
            the first.
        sums: ``sum``: the sums over all ranks of the gradients of shards; None if rows of gradients
            hold them. See [Note: where sums of gradients are kept].
    """

    params: FloatArray
    own_params: FloatArray
    own_grads: FloatArray
    rows: Sequence[FloatArray]
    targets: Sequence[FloatArray]
    sums: ShardArrays | None


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
        params: [region_numel], the node's copy; see [Note: node memory and devices].
        own_params: [region_numel] the same, as this rank may write to it; see
            [Note: weights that behave as in DDP].
        grads: [region_numel], this rank's gradients, as its framework has them.
        row: [region_numel], the same where the kernel reads them; or the one row of averages.
        all_grads: The gradients of all ranks of the node.
        node_grads: [region_numel] each, the same as arrays.
        updated: [region_numel], the parameters where the kernel updates this rank's shards.
        sums: The sums over all ranks of the gradients of shards, or None; see ``sums_of``.
    """

    def __init__(
        self, partition: Partition, index: int, place: tuple[int, int], arrays: RegionArrays
    ) -> None:
        self.region: DtypeRegion
        self.shards: tuple[Shard, ...]
        self.place(partition, index, place)
        self.params = arrays.params
        self.own_params = arrays.own_params
        self.grads = arrays.own_grads
        self.row = arrays.rows[place[1]] if len(arrays.rows) > 1 else arrays.rows[0]
        self.all_grads = Rows.of(*arrays.rows)
        self.node_grads = arrays.rows
        self.sums = arrays.sums
        self.updated = arrays.targets[0]
        self._targets = Rows.of(*arrays.targets)
        self._touch_first()

    def place(self, partition: Partition, index: int, place: tuple[int, int]) -> None:
        """Note where the region is, in a partition that has just been made or rearranged."""
        self.region = partition.regions[index]
        self.shards = partition.shards(*place, index)

    def local(self, span: Span) -> Span:
        """Return a span of the flat index space counted from the start of the region."""
        return span.shift(-self.region.start)

    def targets(self, span: Span) -> Rows:
        """Return the copies of the parameters in a span of the flat index space."""
        return self._targets.part(self.local(span))

    def sources(self, span: Span) -> Rows:
        """Return the gradients of all ranks of the node in a span of the flat index space."""
        return self.all_grads.part(self.local(span))

    def sums_of(self, shard: Shard) -> FloatArray:
        """Return where the owner of a shard keeps the sums of its gradients over all ranks.

        See [Note: where sums of gradients are kept].
        """
        if self.sums is None:
            return self.row[self.local(shard).slice]
        return self.sums.part(shard)["sum"]

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
        del self.params, self.own_params, self.updated, self.sums, self._targets
        del self.grads, self.row, self.all_grads, self.node_grads

    def _touch_first(self) -> None:
        """Write to each part from the rank that will update it: its pages are near its core."""
        for shard in self.shards:
            self.params[self.local(shard).slice].view(np.uint8)[::PAGE_NBYTES] = 0
