"""The memory that a partition takes, computed before anything is allocated."""

from dataclasses import dataclass

import numpy as np

from shardopt.layout.dtypes import compute_dtype, has_master
from shardopt.layout.partition import Partition
from shardopt.layout.traffic import NUM_SLOTS, plan_slot


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes that training takes; the model's own activations are not among them.

    Attributes:
        params_node_nbytes: One copy of the parameters, in shared memory.
        grads_node_nbytes: Every rank's gradients, in shared memory.
        moments_node_nbytes: exp_avg and exp_avg_sq of all shards of the node.
        masters_node_nbytes: The float32 copies of 16-bit parameters, likewise.
        travel_node_nbytes: Between nodes: sums of gradients, and buffers for what is under way.
        node_size: Ranks that share the node.
        replicated_rank_nbytes: What each rank would hold with an optimizer that is not sharded.
    """

    params_node_nbytes: int
    grads_node_nbytes: int
    moments_node_nbytes: int
    masters_node_nbytes: int
    travel_node_nbytes: int
    node_size: int
    replicated_rank_nbytes: int

    @property
    def node_nbytes(self) -> int:
        """All of it on one node."""
        return (
            self.params_node_nbytes
            + self.grads_node_nbytes
            + self.moments_node_nbytes
            + self.masters_node_nbytes
            + self.travel_node_nbytes
        )

    @property
    def rank_nbytes(self) -> int:
        """One rank's equal share of its node."""
        return self.node_nbytes // self.node_size

    @property
    def replicated_node_nbytes(self) -> int:
        """All of it on one node if nothing were sharded."""
        return self.replicated_rank_nbytes * self.node_size


def plan_memory(partition: Partition, wire_dtype: str | None = None) -> MemoryReport:
    """Compute what ``partition`` takes on each node, padding included."""
    regions, num_nodes = partition.regions, partition.num_nodes
    params_nbytes = sum(s.numel * np.dtype(s.dtype).itemsize for s in regions)
    moment_nbytes = sum(s.numel * np.dtype(compute_dtype(s.dtype)).itemsize for s in regions)
    masters_nbytes = sum(4 * s.numel for s in regions if has_master(s.dtype))
    travel_nbytes = 0
    if num_nodes > 1:
        last = num_nodes - 1  # which gets the largest shards
        lanes = range(partition.node_size)
        slots = [plan_slot(partition, last, lane, wire_dtype) for lane in lanes]
        travel_nbytes = moment_nbytes // num_nodes + NUM_SLOTS * sum(map(sum, slots))
    return MemoryReport(
        params_node_nbytes=params_nbytes,
        grads_node_nbytes=params_nbytes * partition.node_size,
        moments_node_nbytes=2 * moment_nbytes // num_nodes,
        masters_node_nbytes=masters_nbytes // num_nodes,
        travel_node_nbytes=travel_nbytes,
        node_size=partition.node_size,
        replicated_rank_nbytes=2 * params_nbytes + 2 * moment_nbytes + masters_nbytes,
    )


def window_nbytes(partition: Partition, regions: range) -> int:
    """Bytes of a node's shared memory that the windows of some regions take."""
    added = [partition.regions[index] for index in regions]
    row_nbytes = sum(region.numel * np.dtype(region.dtype).itemsize for region in added)
    return (1 + partition.node_size) * row_nbytes
