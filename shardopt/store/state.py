"""The optimizer state of a node's shards."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from shardopt._typing import FloatArray
from shardopt.layout.partition import Shard
from shardopt.layout.span import Span
from shardopt.store.buffers import ShardArrays


class StateStore:
    """Keeps the arrays that ``layout.state_spec`` lists, for the elements that a node owns.

    They are in the memory of the node, in flat order: see [Note: the state of a node]. Each rank
    updates the parts of the shards that it owns, there or on its device: see
    [Note: node memory and devices].

    Attributes:
        is_shown: Whether this rank's own views have been handed out, so that users may write there.
        is_untouched: Whether no array of any region has ever been handed out on this rank. If that
            holds on all ranks, nobody has written to the state, and all of it is zero.
    """

    def __init__(self) -> None:
        self.is_shown = False
        self.is_untouched = True
        self._regions: list[Mapping[str, FloatArray]] = []
        self._own: list[Mapping[str, FloatArray]] = []
        self._computed: list[ShardArrays] = []

    def append(
        self,
        arrays: Mapping[str, FloatArray],
        own: Mapping[str, FloatArray],
        computed: ShardArrays,
    ) -> None:
        """Add the arrays of a region.

        Args:
            arrays: [node_numel] each, the node's.
            own: The same, as this rank may write to them.
            computed: What the kernel computes on: the same, or the copies of a device.
        """
        self._regions.append(arrays)
        self._own.append(own)
        self._computed.append(computed)

    def select(self, kept: Sequence[int]) -> None:
        """Release all regions but some."""
        self._regions = [self._regions[index] for index in kept]
        self._own = [self._own[index] for index in kept]
        self._computed = [self._computed[index] for index in kept]

    @contextmanager
    def open(self, shard: Shard) -> Iterator[Mapping[str, FloatArray]]:
        """Yield the state of a shard, [shard_numel] each; writes hold when the block is left."""
        self.is_untouched = False
        yield self._computed[shard.region].part(shard)

    def part(self, shard: Shard, local: Span) -> Mapping[str, FloatArray]:
        """Return part of a shard of the state where the kernel computes on it.

        Args:
            shard: One that this rank owns.
            local: Counted as in ``Shard.local``.
        """
        self.is_untouched = False
        return self._computed[shard.region].part(shard, local)

    def free(self) -> None:
        """Release all arrays."""
        self._regions.clear()
        self._own.clear()
        self._computed.clear()

    def arrays(self, region: int) -> Mapping[str, FloatArray]:
        """Return the state of a region's shards on this node, [node_numel] each."""
        self.is_untouched = False
        return self._regions[region]

    def own_arrays(self, region: int) -> Mapping[str, FloatArray]:
        """Return the same as this rank, or its user, may write to it."""
        self.is_shown, self.is_untouched = True, False
        return self._own[region]
