"""Memory that a partition needs, computed before anything is allocated."""

from dataclasses import dataclass

import numpy as np

from shardopt.partition import Partition


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes of parameters, gradients and moments; the model's own activations are not in it.

    Attributes:
        params_node_nbytes: One copy of the parameters, in shared memory.
        grads_node_nbytes: Every rank's gradients, in shared memory.
        moments_node_nbytes: exp_avg and exp_avg_sq of all shards of the node.
        node_size: Ranks that share the node.
        replicated_rank_nbytes: What each rank would hold with an optimizer that is not sharded.
    """

    params_node_nbytes: int
    grads_node_nbytes: int
    moments_node_nbytes: int
    node_size: int
    replicated_rank_nbytes: int

    @property
    def node_nbytes(self) -> int:
        """All of it on one node."""
        return self.params_node_nbytes + self.grads_node_nbytes + self.moments_node_nbytes

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
    section_nbytes = [s.numel * np.dtype(s.dtype).itemsize for s in partition.sections]
    params_nbytes = sum(section_nbytes)
    return MemoryReport(
        params_node_nbytes=params_nbytes,
        grads_node_nbytes=params_nbytes * partition.node_size,
        moments_node_nbytes=2 * params_nbytes // partition.num_nodes,
        node_size=partition.node_size,
        replicated_rank_nbytes=4 * params_nbytes,
    )
