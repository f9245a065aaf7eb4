"""The memory of one region: parameters and gradients in a window, the rest in private arrays."""

import numpy as np

from shardopt._typing import FloatArray
from shardopt.backends.cpu.memory import padded_zeros
from shardopt.comm.shared_memory import Window
from shardopt.comm.topology import Topology
from shardopt.layout.dtypes import compute_dtype, has_master, state_keys
from shardopt.layout.padding import row_numel
from shardopt.layout.partition import DtypeRegion, Partition, PlacedParam, Shard


class ShardBuffers:
    """The arrays of one region, as this rank sees them.

    Collective over the node: construction and ``free``.

    Attributes:
        region: Its place in the flat index space.
        shards: The shards this rank owns, one for each bucket.
        params: [section_numel], one copy on the node.
        grads: [node_size, section_numel or more]; row ``node_rank`` is this rank's to write.
        sums: [owned_numel] gradients of this rank's shards, summed over all nodes; empty where
            there is but one node, whose kernel reads them where they are.
        state: Arrays of [owned_numel], this rank's shards end to end, by their names in state
            dicts: ``exp_avg``, ``exp_avg_sq`` and for 16-bit parameters ``master``; see
            [Note: sixteen bits and a master].
    """

    def __init__(self, partition: Partition, index: int, topology: Topology) -> None:
        self.region: DtypeRegion = partition.regions[index]
        self.shards: tuple[Shard, ...] = partition.shards(topology.node, topology.node_rank, index)
        self.node_rank = topology.node_rank
        numel, dtype = self.region.numel, self.region.dtype
        row = row_numel(numel, dtype)
        num_rows = 2 if self.node_rank == 0 else 1  # rank 0 brings the parameters' row as well
        self._window = Window(topology.node_comm, num_rows * row * np.dtype(dtype).itemsize)
        rows: FloatArray = self._window.memory.view(dtype).reshape(1 + topology.node_size, row)
        self.params: FloatArray = rows[0, :numel]
        self.grads: FloatArray = rows[1:]
        owned_numel = sum(shard.numel for shard in self.shards)
        full = compute_dtype(dtype)
        self.state: dict[str, FloatArray] = {
            key: padded_zeros(owned_numel, full, len(rows) + i, self.params)
            for i, key in enumerate(state_keys(dtype))
        }
        sums_numel = owned_numel if topology.num_nodes > 1 else 0
        stream = len(rows) + len(self.state)
        self.sums: FloatArray = padded_zeros(sums_numel, full, stream, self.params)
        self._touch_first()

    @property
    def holds_sums(self) -> bool:
        """Whether the dtype of gradients can hold their sum over ranks."""
        return not has_master(self.region.dtype)

    def positions(self, shard: Shard) -> tuple[int, int]:
        """A shard's [start, stop) counted from the start of the region."""
        return shard.start - self.region.start, shard.stop - self.region.start

    def param_view(self, param: PlacedParam) -> FloatArray:
        """The parameter in the node's window, in its own shape."""
        return self._view(self.params, param)

    def grad_view(self, param: PlacedParam) -> FloatArray:
        """This rank's gradient of the parameter, in its own shape."""
        return self._view(self.grads[self.node_rank], param)

    def zero_grads(self) -> None:
        """Zero this rank's gradients."""
        self.grads[self.node_rank, : self.region.numel].view(np.uint8)[:] = 0

    def sync(self) -> None:
        """See [Note: when stores become visible]."""
        self._window.sync()

    def free(self) -> None:
        """Release the window. Collective over the node."""
        del self.params, self.grads
        self._window.free()

    def _view(self, flat: FloatArray, param: PlacedParam) -> FloatArray:
        start = param.start - self.region.start
        return flat[start : start + param.spec.numel].reshape(param.spec.shape)

    def _touch_first(self) -> None:
        """Zero each part from the rank that will write it: that places its pages near its core."""
        for shard in self.shards:
            start, stop = self.positions(shard)
            self.params[start:stop] = 0
        self.zero_grads()
        for array in self.state.values():
            array[:] = 0
