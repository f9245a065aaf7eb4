"""The memory that a partition takes, computed before anything is allocated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardopt.layout.dtypes import compute_dtype
from shardopt.layout.node_arrays import plan_param_arrays, plan_state_arrays
from shardopt.layout.partition import Partition
from shardopt.layout.state_spec import state_specs
from shardopt.layout.traffic import NUM_STAGING_BUFFERS, plan_staging_buffer


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """The memory that training takes, in bytes; activations are not counted.

    Attributes:
        params_node_nbytes: One copy of the parameters, in memory that its ranks share.
        grads_node_nbytes: Every rank's gradients, likewise.
        moments_node_nbytes: exp_avg and exp_avg_sq of all shards of the node.
        masters_node_nbytes: The float32 copies of 16-bit parameters, likewise.
        travel_node_nbytes: With several nodes, sums of gradients and staging buffers.
        written_node_nbytes: What is added, until the next step or save, if every rank writes to all
            parameters by itself, as loading a state dict into the model does; not in the sum.
        node_size: Ranks that share the node.
        replicated_rank_nbytes: The same for a rank of an optimizer that is not sharded.
    """

    params_node_nbytes: int
    grads_node_nbytes: int
    moments_node_nbytes: int
    masters_node_nbytes: int
    travel_node_nbytes: int
    written_node_nbytes: int
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


def plan_memory(
    partition: Partition, wire_dtype: str | None = None, trained: Sequence[bool] | None = None
) -> MemoryReport:
    """Compute the memory that ``partition`` takes on each node, padding included.

    Args:
        partition: The layout.
        wire_dtype: As in ``ShardPolicy``.
        trained: Whether each parameter is trained; others need neither gradients nor state. None
            if all are.
    """
    regions, num_nodes = partition.regions, partition.num_nodes
    params_nbytes = grads_nbytes = 0
    state_nbytes = {"exp_avg": 0, "exp_avg_sq": 0, "master": 0}
    for region in regions:
        itemsize = np.dtype(region.dtype).itemsize
        frozen = [i for i in region.param_indices if trained is not None and not trained[i]]
        trained_numel = region.numel - partition.removed_numel(region)
        trained_numel -= sum(partition.params[index].numel for index in frozen)
        params_nbytes += region.numel * itemsize
        grads_nbytes += trained_numel * itemsize
        for spec in state_specs(region.dtype):
            state_nbytes[spec.key] += spec.nbytes(trained_numel)
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
        grads_node_nbytes=grads_nbytes * partition.node_size,
        moments_node_nbytes=moments_nbytes // num_nodes,
        masters_node_nbytes=masters_nbytes // num_nodes,
        travel_node_nbytes=travel_nbytes,
        written_node_nbytes=params_nbytes * partition.node_size,
        node_size=partition.node_size,
        replicated_rank_nbytes=params_nbytes + grads_nbytes + moments_nbytes + masters_nbytes,
    )


@dataclass(frozen=True, slots=True)
class NodeNeed:
    """The memory that new parameters take on a node, in bytes.

    Attributes:
        least_nbytes: Memory that the node must have beside what is in use now: training touches it
            for sure, while the ranks' own copies of the parameters are given back.
        view_nbytes: Each rank's view of it to write to, which takes memory only where it writes.
    """

    least_nbytes: int
    view_nbytes: int


def plan_node_need(
    partition: Partition, node: int, regions: range, trained: Mapping[int, bool]
) -> NodeNeed:
    """Compute the memory that the parameters of some regions take on a node.

    Args:
        partition: The layout.
        node: The node.
        regions: The new regions.
        trained: For the number of each parameter in them whether it requires a gradient; others
            have neither gradients nor state.
    """
    params = plan_param_arrays(partition, regions)
    state = plan_state_arrays(partition, node, regions)
    params_nbytes = trained_nbytes = 0
    for index, is_trained in trained.items():
        param = partition.params[index]
        itemsize = np.dtype(param.spec.dtype).itemsize
        params_nbytes += param.numel * itemsize
        state_nbytes = sum(spec.nbytes(param.numel) for spec in state_specs(param.spec.dtype))
        grads_nbytes = partition.node_size * param.numel * itemsize
        trained_nbytes += is_trained * (grads_nbytes + state_nbytes // partition.num_nodes)
    given_back_nbytes = partition.node_size * params_nbytes
    total_nbytes = params_nbytes + trained_nbytes
    least_nbytes = max(params_nbytes, total_nbytes - given_back_nbytes)
    return NodeNeed(least_nbytes, params.nbytes + state.nbytes)
