"""All memory of an optimizer on this rank: a region's buffers after the other, and the state."""

from shardopt.backends.base import Backend
from shardopt.comm.topology import Topology
from shardopt.layout.partition import Partition
from shardopt.store.buffers import ShardBuffers
from shardopt.store.state import StateStore


class Memory:
    """The buffers of all regions, and the optimizer state of this rank's shards.

    Args:
        topology: The ranks.
        backend: Where the memory is.

    Attributes:
        buffers: One for each region.
        state: See ``StateStore``.
    """

    def __init__(self, topology: Topology, backend: Backend) -> None:
        self.buffers: list[ShardBuffers] = []
        self.state = StateStore(backend)
        self._topology = topology
        self._backend = backend

    def extend(self, partition: Partition) -> None:
        """Allocate the regions that are new in a partition. Collective over the node."""
        for index in range(len(self.buffers), len(partition.regions)):
            buffers = ShardBuffers(partition, index, self._topology, self._backend)
            self.buffers.append(buffers)
        self.state.extend(self.buffers)

    @property
    def overflows_easily(self) -> bool:
        """Whether some gradients have 16 bits: float16 overflows, and its losses are scaled."""
        return not all(buffers.holds_sums for buffers in self.buffers)

    def publish(self) -> None:
        """Make this rank's stores visible; see [Note: when stores become visible]."""
        for buffers in self.buffers:
            buffers.publish()

    def acquire(self) -> None:
        """See the stores of other ranks; see [Note: when stores become visible]."""
        for buffers in self.buffers:
            buffers.acquire()

    def zero_grads(self) -> None:
        """Zero this rank's gradients."""
        for buffers in self.buffers:
            buffers.zero_grads()

    def scale_grads(self, factor: float) -> None:
        """Multiply this rank's gradients."""
        for buffers in self.buffers:
            buffers.grads *= buffers.grads.dtype.type(factor)

    def free(self) -> None:
        """Release everything. Collective over the node."""
        for buffers in self.buffers:
            buffers.free()
        self.buffers.clear()
        self.state.free()
