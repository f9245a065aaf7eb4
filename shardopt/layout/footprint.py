"""The memory that a partition takes, computed before anything is allocated."""

from dataclasses import dataclass

import numpy as np

from shardopt.layout.dtypes import compute_dtype
from shardopt.layout.partition import Partition
from shardopt.layout.state_spec import state_specs
from shardopt.layout.traffic import NUM_STAGING_BUFFERS, plan_staging_buffer


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """The memory that training takes, in bytes; activations are not counted.

    Attributes:
        params_node_nbytes: One copy of the parameters, in shared memory.
        grads_node_nbytes: Every rank's gradients, in shared memory.
        moments_node_nbytes: exp_avg and exp_avg_sq of all shards of the node.
        masters_node_nbytes: The float32 copies of 16-bit parameters, likewise.
        travel_node_nbytes: With several nodes, sums of gradients and staging buffers.
        node_size: Ranks that share the node.
        replicated_rank_nbytes: The same for a rank of an optimizer that is not sharded.
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
        """The sum for one node."""
        return (
            self.params_node_nbytes
            + self.grads_node_nbytes
            + self.moments_node_nbytes
            + self.masters_node_nbytes
            + self.travel_node_nbytes
        )

    @property
    def rank_nbytes(self) -> int:
        """An equal share of the node for each rank."""
        return self.node_nbytes // self.node_size

    @property
    def replicated_node_nbytes(self) -> int:
        """The sum for one node if nothing were sharded."""
        return self.replicated_rank_nbytes * self.node_size


def plan_memory(partition: Partition, wire_dtype: str | None = None) -> MemoryReport:
    """Compute the memory that ``partition`` takes on each node, padding included."""
    regions, num_nodes = partition.regions, partition.num_nodes
    params_nbytes = sum(r.numel * np.dtype(r.dtype).itemsize for r in regions)
    state_nbytes = {"exp_avg": 0, "exp_avg_sq": 0, "master": 0}
    for region in regions:
        for spec in state_specs(region.dtype):
            state_nbytes[spec.key] += spec.nbytes(region.numel)
    masters_nbytes = state_nbytes.pop("master")
    moments_nbytes = sum(state_nbytes.values())
    travel_nbytes = 0
    if num_nodes > 1:
        last = num_nodes - 1  # it gets the largest shards
        lanes = range(partition.node_size)
        staging = [plan_staging_buffer(partition, last, lane, wire_dtype) for lane in lanes]
        sums_nbytes = sum(r.numel * np.dtype(compute_dtype(r.dtype)).itemsize for r in regions)
        travel_nbytes = sums_nbytes // num_nodes + NUM_STAGING_BUFFERS * sum(map(sum, staging))
    return MemoryReport(
        params_node_nbytes=params_nbytes,
        grads_node_nbytes=params_nbytes * partition.node_size,
        moments_node_nbytes=moments_nbytes // num_nodes,
        masters_node_nbytes=masters_nbytes // num_nodes,
        travel_node_nbytes=travel_nbytes,
        node_size=partition.node_size,
        replicated_rank_nbytes=2 * params_nbytes + moments_nbytes + masters_nbytes,
    )


def shared_nbytes(partition: Partition, regions: range) -> int:
    """Return the bytes of a node's shared memory that some regions take."""
    added = [partition.regions[index] for index in regions]
    row_nbytes = sum(region.numel * np.dtype(region.dtype).itemsize for region in added)
    return (1 + partition.node_size) * row_nbytes
