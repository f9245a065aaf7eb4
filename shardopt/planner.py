"""What a partition costs, memory and messages, computed before anything is allocated."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from shardopt.dtypes import compute_dtype, has_master, wire_dtype_of
from shardopt.partition import Partition
from shardopt.stagger import STEP_NBYTES

MIB = 1 << 20

NUM_SLOTS = 6
"""Buckets of gradients under way at a time: enough to keep the link busy while a rank is late."""


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


def default_bucket_nbytes(num_nodes: int, world_size: int) -> int:
    """Bytes of parameters in a bucket, unless the policy says.

    On one node nothing is exchanged, and a bucket is what a kernel is called for. Between nodes
    small buckets keep the link busy from the first to the last: a step ends with the way of the
    last one. But each rank's part of it should be worth a message.
    """
    return 32 * MIB if num_nodes == 1 else max(4 * MIB, world_size * MIB // 16)


class Traffic(NamedTuple):
    """What a rank sends to other nodes in a step; agreements of a few bytes are left out."""

    nbytes: int
    messages: int


def plan_traffic(
    partition: Partition, node: int, node_rank: int, wire_dtype: str | None = None
) -> Traffic:
    """Compute what a rank sends in a step.

    Of each bucket it sends the others' shards of its lane part, summed over its node, and its own
    shard, updated, to each of the others; what is empty is not sent. Over all ranks of a node that
    is (M-1)/M of all gradients and (M-1)/M of all parameters, for M nodes.

    Args:
        partition: The layout.
        node: The rank's node.
        node_rank: The rank's lane.
        wire_dtype: As in ``ShardPolicy``.
    """
    nbytes = messages = 0
    others = partition.num_nodes - 1
    for dtype, wire, cuts in _lane_parts(partition, node_rank, wire_dtype):
        shards = [stop - start for start, stop in pairwise(cuts)]
        own = shards.pop(node)
        nbytes += sum(shards) * np.dtype(wire).itemsize + own * others * np.dtype(dtype).itemsize
        messages += sum(map(bool, shards)) + bool(own) * others
    return Traffic(nbytes, messages)


def plan_slot(
    partition: Partition, node: int, node_rank: int, wire_dtype: str | None
) -> tuple[int, int]:
    """Compute the bytes a rank needs for a bucket under way: for what it sends, and receives.

    Args:
        partition: The layout.
        node: The rank's node.
        node_rank: The rank's lane.
        wire_dtype: As in ``ShardPolicy``.
    """
    send = receive = 0
    for dtype, wire, cuts in _lane_parts(partition, node_rank, wire_dtype):
        itemsize = np.dtype(wire).itemsize
        if not sends_grads(dtype, partition.node_size, wire):
            send = max(send, (cuts[-1] - cuts[0]) * itemsize)
        row = row_numel_between_nodes(cuts[node + 1] - cuts[node], itemsize)
        receive = max(receive, partition.num_nodes * row * itemsize)
    return send, receive


def _lane_parts(
    partition: Partition, node_rank: int, wire_dtype: str | None
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield each bucket's dtype, that of its sums on the wire, and its nodes' cuts."""
    for bucket in partition.buckets:
        dtype = partition.sections[bucket.section].dtype
        wire = wire_dtype_of(dtype, partition.node_size, wire_dtype)
        yield dtype, wire, partition.lane_cuts(bucket, node_rank)


def sends_grads(dtype: str, node_size: int, wire_dtype: str) -> bool:
    """Whether gradients travel as they are: there is nothing to add or to round."""
    return node_size == 1 and wire_dtype == dtype


def row_numel_between_nodes(numel: int, itemsize: int) -> int:
    """Elements from one node's part of a shard to the next, as [Note: staggered streams] wants."""
    return numel + STEP_NBYTES // itemsize


def plan_memory(partition: Partition, wire_dtype: str | None = None) -> MemoryReport:
    """Compute what ``partition`` takes on each node, padding included."""
    sections, num_nodes = partition.sections, partition.num_nodes
    params_nbytes = sum(s.numel * np.dtype(s.dtype).itemsize for s in sections)
    moment_nbytes = sum(s.numel * np.dtype(compute_dtype(s.dtype)).itemsize for s in sections)
    masters_nbytes = sum(4 * s.numel for s in sections if has_master(s.dtype))
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
