"""The memory that a partition takes, computed before anything is allocated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shardopt.layout.dtypes import compute_dtype
from shardopt.layout.node_arrays import keeps_sums_apart, plan_param_arrays, plan_state_arrays
from shardopt.layout.partition import Partition
from shardopt.layout.ring import RingPlan, most_waiting_nbytes, num_ring_staging_buffers
from shardopt.layout.traffic import NUM_STAGING_BUFFERS, staging_node_nbytes

Placement = Literal["cpu", "cuda", "offload"]
"""Where arrays are: in the memory of a node, on the GPUs of its ranks, or moments in the memory of
the node and parameters and gradients in both."""


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """The memory that training takes, in bytes; activations are not counted.

    Nor are the Python objects that each rank has beside its arrays: some 10 KiB for each parameter,
    and 3 KiB for each bucket.

    What belongs to a node is in memory that its ranks share or, with the placement ``cuda``, on
    their GPUs: all of it but staging buffers, of which the host has the memory. What the host holds
    of GPUs beside that is not counted: one copy of the parameters; where GPUs are staged or there
    are several nodes, what passes through; and what a save or a state dict brings there.

    Attributes:
        placement: Where arrays are.
        params_node_nbytes: One copy of the parameters, or one on each GPU.
        grads_node_nbytes: Every rank's gradients, or one row of averages; in stage 2 on several
            nodes 0, as only averages of the node's shards are kept, which ``travel_node_nbytes``
            counts. There ``average_grads()`` and ``accumulate="node"`` add a row: another
            ``params_node_nbytes``, which is counted for the latter. Nothing where backward updates
            parameters.
        moments_node_nbytes: exp_avg and exp_avg_sq of all shards of the node.
        masters_node_nbytes: The float32 copies of 16-bit parameters, likewise.
        ring_node_nbytes: The ring through which gradients pass into the one row of averages that a
            node has in stage 2; 0 in stage 1.
        late_node_nbytes: Gradients that all ranks together keep in private memory in stage 2 while
            the ring is full, at most; they wait for others for 50 ms at a time rather than keep
            more. 0 in stage 1.
        travel_node_nbytes: Sums of gradients, as far as they take memory of their own (see
            [Note: where sums of gradients are kept]), and staging buffers between nodes.
        written_node_nbytes: What is added, until the next step or save, if every rank writes to all
            parameters by itself, as loading a state dict into the model does; not in the sum. None
            on GPUs, where each rank has a copy in any case.
        node_size: Ranks that share the node.
        replicated_rank_nbytes: The same for a rank of an optimizer that is not sharded.
        device_rank_nbytes: On the GPU of each rank: an equal share of what the GPUs of the node
            hold or, with the placement ``offload``, parameters and gradients beside those that are
            in the memory of the node.
    """

    placement: Placement
    params_node_nbytes: int
    grads_node_nbytes: int
    ring_node_nbytes: int
    late_node_nbytes: int
    moments_node_nbytes: int
    masters_node_nbytes: int
    travel_node_nbytes: int
    written_node_nbytes: int
    node_size: int
    replicated_rank_nbytes: int
    device_rank_nbytes: int

    @property
    def node_nbytes(self) -> int:
        """The sum for one node."""
        return (
            self.params_node_nbytes
            + self.grads_node_nbytes
            + self.ring_node_nbytes
            + self.late_node_nbytes
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
    partition: Partition,
    wire_dtype: str | None = None,
    trained: Sequence[bool] | None = None,
    *,
    needs_norm: bool = False,
    placement: Placement = "cpu",
    ring: RingPlan | None = None,
    sums_by_node: bool = False,
    has_averages: bool = True,
    has_late: bool = True,
) -> MemoryReport:
    """Compute the memory that ``partition`` takes on each node, padding included.

    Args:
        partition: The layout.
        wire_dtype: As ``layout.dtypes.wire_of`` returns it.
        trained: Whether each parameter is trained; others need neither gradients nor state. None
            if all are.
        needs_norm: Whether steps measure the norm of the gradient before the update, as they do
            with ``max_grad_norm``.
        placement: Where arrays are.
        ring: That of stage 2; None in stage 1.
        sums_by_node: Whether a node sums several backwards before it exchanges them; see
            ``ShardPolicy.accumulate``.
        has_averages: Whether stage 2 keeps averages, of all parameters or of the node's shards, as
            it does unless backward updates.
        has_late: Whether gradients that find no room in the ring are kept for it alone, as they are
            where backward hands them over; see ``Adapter.reports_grads``.
    """
    regions, num_nodes = partition.regions, partition.num_nodes
    params_nbytes = grads_nbytes = averages_nbytes = sums_nbytes = 0
    state_nbytes = {"exp_avg": 0, "exp_avg_sq": 0, "master": 0}
    for number, region in enumerate(regions):
        itemsize = np.dtype(region.dtype).itemsize
        frozen = [i for i in region.param_indices if trained is not None and not trained[i]]
        trained_numel = region.numel - partition.removed_numel(region)
        trained_numel -= sum(partition.params[index].numel for index in frozen)
        params_nbytes += region.numel * itemsize
        grads_nbytes += trained_numel * itemsize
        averages_nbytes += trained_numel * np.dtype(compute_dtype(region.dtype)).itemsize
        averages_shards = num_nodes > 1 and has_averages
        needs_sums = keeps_sums_apart(partition, number) and (ring is None or averages_shards)
        if needs_sums and (num_nodes > 1 or needs_norm):
            summed_numel = region.numel if num_nodes > 1 and not ring else trained_numel
            sums_nbytes += summed_numel * np.dtype(compute_dtype(region.dtype)).itemsize
        for spec in region.state:
            state_nbytes[spec.key] += spec.nbytes(trained_numel)
    masters_nbytes = state_nbytes.pop("master")
    moments_nbytes = sum(state_nbytes.values())
    each_nbytes = params_nbytes + grads_nbytes
    sharded_nbytes = moments_nbytes + masters_nbytes + sums_nbytes
    on_devices = {"cuda": each_nbytes + sharded_nbytes // partition.world_size}
    on_devices |= {"cpu": 0, "offload": each_nbytes}
    late_rank_nbytes = _late_rank_nbytes(partition, trained) if has_late else 0
    num_copies = partition.node_size if placement == "cuda" else 1
    num_rows = partition.node_size
    if ring is not None:
        num_rows = int(has_averages and (num_nodes == 1 or sums_by_node))
    return MemoryReport(
        placement=placement,
        params_node_nbytes=params_nbytes * num_copies,
        grads_node_nbytes=(averages_nbytes if ring else grads_nbytes) * num_rows,
        ring_node_nbytes=ring.nbytes if ring else 0,
        late_node_nbytes=late_rank_nbytes * ring.node_size if ring else 0,
        moments_node_nbytes=moments_nbytes // num_nodes,
        masters_node_nbytes=masters_nbytes // num_nodes,
        travel_node_nbytes=sums_nbytes // num_nodes
        + _staging_node_nbytes(partition, wire_dtype, placement, ring),
        written_node_nbytes=params_nbytes * partition.node_size if placement == "cpu" else 0,
        node_size=partition.node_size,
        replicated_rank_nbytes=each_nbytes + moments_nbytes + masters_nbytes,
        device_rank_nbytes=on_devices[placement],
    )


def _late_rank_nbytes(partition: Partition, trained: Sequence[bool] | None) -> int:
    indices = range(len(partition.params))
    return most_waiting_nbytes(partition, [i for i in indices if trained is None or trained[i]])


def _staging_node_nbytes(
    partition: Partition, wire_dtype: str | None, placement: Placement, ring: RingPlan | None
) -> int:
    if partition.num_nodes == 1:
        return 0
    count = NUM_STAGING_BUFFERS if ring is None else num_ring_staging_buffers(partition, wire_dtype)
    from_device = placement == "cuda" or ring is not None
    return count * staging_node_nbytes(partition, wire_dtype, from_device=from_device)


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
    partition: Partition,
    node: int,
    regions: range,
    trained: Mapping[int, bool],
    num_rows: int,
) -> NodeNeed:
    """Compute the memory that the parameters of some regions take on a node.

    Args:
        partition: The layout.
        node: The node.
        regions: The new regions.
        trained: For the number of each parameter in them whether it requires a gradient; others
            have neither gradients nor state.
        num_rows: Rows of gradients on the node: one for each rank in stage 1.
    """
    params = plan_param_arrays(partition, regions)
    state = plan_state_arrays(partition, node, regions)
    params_nbytes = trained_nbytes = 0
    for index, is_trained in trained.items():
        param = partition.params[index]
        itemsize = np.dtype(param.spec.dtype).itemsize
        params_nbytes += param.numel * itemsize
        state_nbytes = sum(spec.nbytes(param.numel) for spec in param.spec.state)
        grads_nbytes = num_rows * param.numel * itemsize
        trained_nbytes += is_trained * (grads_nbytes + state_nbytes // partition.num_nodes)
    given_back_nbytes = partition.node_size * params_nbytes
    total_nbytes = params_nbytes + trained_nbytes
    least_nbytes = max(params_nbytes, total_nbytes - given_back_nbytes)
    return NodeNeed(least_nbytes, params.nbytes + state.nbytes)
