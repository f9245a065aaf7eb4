"""The parameters and gradients of one region, in memory that the ranks of a node share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardopt.backends.base import Rows
from shardopt.layout.dtypes import compute_dtype, has_master
from shardopt.layout.padding import row_numel
from shardopt.layout.state_spec import state_specs

if TYPE_CHECKING:
    from shardopt._typing import FloatArray
    from shardopt.backends.base import Backend
    from shardopt.comm.topology import Topology
    from shardopt.layout.partition import DtypeRegion, Partition, PlacedParam
    from shardopt.layout.span import Span


class ShardBuffers:
    """The parameters and gradients of one region, as this rank sees them.

    Collective over the node: construction and ``free``.

    Args:
        partition: The layout.
        index: Number of the region.
        topology: The ranks.
        backend: Where the memory is.

    Attributes:
        region: Its place in the flat index space.
        shards: The shards this rank owns, one per bucket.
        params: [region_numel], one copy on the node.
        grads: [region_numel], this rank's gradients.
        all_grads: The gradients of all ranks of the node.
        sums: [owned_numel] gradients of this rank's shards, summed over all nodes; empty on a
            single node, where the kernel reads them in place.
        num_arrays: Parameters and gradients are arrays 0, 1 ... of so many of the region, and its
            optimizer state the next ones; see [Note: padding between arrays].
    """

    def __init__(
        self, partition: Partition, index: int, topology: Topology, backend: Backend
    ) -> None:
        self.region = partition.regions[index]
        self.shards = partition.shards(topology.node, topology.node_rank, index)
        numel, dtype = self.region.numel, self.region.dtype
        num_rows = 2 if topology.node_rank == 0 else 1  # rank 0 adds the row of the parameters
        self._memory = backend.share(topology.node_comm, num_rows * self.row_nbytes(self.region))
        rows: FloatArray = self._memory.memory.view(dtype).reshape(1 + topology.node_size, -1)
        self.params: FloatArray = rows[0, :numel]
        self.grads: FloatArray = rows[1 + topology.node_rank, :numel]
        self.all_grads = Rows.of(*(grads[:numel] for grads in rows[1:]))
        self._targets = Rows.of(self.params)
        sums_numel = self.owned_numel if topology.num_nodes > 1 else 0
        self.num_arrays = len(rows)
        behind_state = self.num_arrays + len(state_specs(dtype))
        self.sums: FloatArray = backend.zeros(
            sums_numel, compute_dtype(dtype), behind_state, self.params
        )
        self._touch_first()

    @staticmethod
    def row_nbytes(region: DtypeRegion) -> int:
        """Return the bytes of shared memory that the parameters, or one rank's gradients, take."""
        itemsize = np.dtype(region.dtype).itemsize
        return row_numel(region.numel, region.dtype) * itemsize

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

    def param_view(self, param: PlacedParam) -> FloatArray:
        """Return the node's copy of a parameter, in its own shape."""
        return self.params[self.local(param).slice].reshape(param.spec.shape)

    def grad_view(self, param: PlacedParam) -> FloatArray:
        """Return this rank's gradient of a parameter, in its own shape."""
        return self.grads[self.local(param).slice].reshape(param.spec.shape)

    def zero_grads(self) -> None:
        """Zero this rank's gradients."""
        self.grads.view(np.uint8)[:] = 0

    def publish(self) -> None:
        """Make this rank's stores visible; see [Note: when stores become visible]."""
        self._memory.publish()

    def acquire(self) -> None:
        """See the stores of other ranks; see [Note: when stores become visible]."""
        self._memory.acquire()

    def free(self) -> None:
        """Release all memory. Collective over the node."""
        del self.params, self.grads, self.all_grads, self.sums, self._targets
        self._memory.free()

    def _touch_first(self) -> None:
        """Zero each part from the rank that will write it, which places its pages near its core."""
        for shard in self.shards:
            self.params[self.local(shard).slice] = 0
        self.zero_grads()
