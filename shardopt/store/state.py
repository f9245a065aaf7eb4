"""The optimizer state of this rank's shards."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend
from shardopt.layout.partition import Shard
from shardopt.layout.state_spec import state_specs
from shardopt.store.buffers import ShardBuffers


class StateStore:
    """Keeps the arrays that ``layout.state_spec`` lists, for the elements that this rank owns.

    Args:
        backend: Where the arrays are.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._regions: list[dict[str, FloatArray]] = []

    def extend(self, buffers: Sequence[ShardBuffers]) -> None:
        """Allocate zeros for the regions that are new.

        Args:
            buffers: Of all regions.
        """
        for buffer in buffers[len(self._regions) :]:
            specs = state_specs(buffer.region.dtype)
            arrays = {
                spec.key: self._backend.zeros(
                    buffer.owned_numel, spec.dtype, buffer.num_arrays + i, buffer.params
                )
                for i, spec in enumerate(specs)
            }
            for array in arrays.values():
                array[:] = 0  # places the pages near this rank's core
            self._regions.append(arrays)

    @contextmanager
    def open(self, shard: Shard) -> Iterator[Mapping[str, FloatArray]]:
        """Yield the state of a shard, [shard_numel] each; writes hold when the block is left."""
        yield {key: array[shard.local.slice] for key, array in self._regions[shard.region].items()}

    def free(self) -> None:
        """Release all arrays."""
        self._regions.clear()

    def arrays(self, region: int) -> Mapping[str, FloatArray]:
        """Return the state of a region, [owned_numel] each: this rank's shards end to end."""
        return self._regions[region]
