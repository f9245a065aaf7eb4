"""The optimizer state of a node's shards."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from shardopt._typing import FloatArray
from shardopt.layout.partition import Shard


class StateStore:
    """Keeps the arrays that ``layout.state_spec`` lists, for the elements that a node owns.

    They are in the memory of the node, in flat order: see [Note: the state of a node]. Each rank
    updates the parts of the shards that it owns.

    Attributes:
        is_shown: Whether this rank's own views have been handed out, so that users may write there.
    """

    def __init__(self) -> None:
        self.is_shown = False
        self._regions: list[Mapping[str, FloatArray]] = []
        self._own: list[Mapping[str, FloatArray]] = []

    def append(self, arrays: Mapping[str, FloatArray], own: Mapping[str, FloatArray]) -> None:
        """Add the arrays of a region.

        Args:
            arrays: [node_numel] each, the node's.
            own: The same, as this rank may write to them.
        """
        self._regions.append(arrays)
        self._own.append(own)

    def select(self, kept: Sequence[int]) -> None:
        """Release all regions but some."""
        self._regions = [self._regions[index] for index in kept]
        self._own = [self._own[index] for index in kept]

    @contextmanager
    def open(self, shard: Shard) -> Iterator[Mapping[str, FloatArray]]:
        """Yield the state of a shard, [shard_numel] each; writes hold when the block is left."""
        yield {key: array[shard.local.slice] for key, array in self._regions[shard.region].items()}

    def free(self) -> None:
        """Release all arrays."""
        self._regions.clear()
        self._own.clear()

    def arrays(self, region: int) -> Mapping[str, FloatArray]:
        """Return the state of a region's shards on this node, [node_numel] each."""
        return self._regions[region]

    def own_arrays(self, region: int) -> Mapping[str, FloatArray]:
        """Return the same as this rank, or its user, may write to it."""
        self.is_shown = True
        return self._own[region]
