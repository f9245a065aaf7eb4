"""Memory that a partition needs, computed before anything is allocated."""

from dataclasses import dataclass

import numpy as np

from shardopt.dtypes import compute_dtype, has_master
from shardopt.partition import Partition


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes that training takes; the model's own activations are not among them.

    Attributes:
        params_node_nbytes: One copy of the parameters, in shared memory.
        grads_node_nbytes: Every rank's gradients, in shared memory.
        moments_node_nbytes: exp_avg and exp_avg_sq of all shards of the node.
        masters_node_nbytes: The float32 copies of 16-bit parameters, likewise.
        node_size: Ranks that share the node.
        replicated_rank_nbytes: What each rank would hold with an optimizer that is not sharded.
    """

    params_node_nbytes: int
    grads_node_nbytes: int
    moments_node_nbytes: int
    masters_node_nbytes: int
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
        )

    @property
    def rank_nbytes(self) -> int:
        """One rank's equal share of its node."""
        return self.node_nbytes // self.node_size

    @property
    def replicated_node_nbytes(self) -> int:
        """All of it on one node if nothing were sharded."""
        return self.replicated_rank_nbytes * self.node_size


def plan_memory(partition: Partition) -> MemoryReport:
    """Compute what ``partition`` takes on each node, padding included."""
    sections = partition.sections
    params_nbytes = sum(s.numel * np.dtype(s.dtype).itemsize for s in sections)
    moment_nbytes = sum(s.numel * np.dtype(compute_dtype(s.dtype)).itemsize for s in sections)
    masters_nbytes = sum(4 * s.numel for s in sections if has_master(s.dtype))
    return MemoryReport(
        params_node_nbytes=params_nbytes,
        grads_node_nbytes=params_nbytes * partition.node_size,
        moments_node_nbytes=2 * moment_nbytes // partition.num_nodes,
        masters_node_nbytes=masters_nbytes // partition.num_nodes,
        node_size=partition.node_size,
        replicated_rank_nbytes=2 * params_nbytes + 2 * moment_nbytes + masters_nbytes,
    )
