"""What a partition costs, memory and messages, computed before anything is allocated."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from shardopt.layout.dtypes import wire_dtype_of
from shardopt.layout.padding import STEP_NBYTES
from shardopt.layout.partition import Partition

MIB = 1 << 20

NUM_SLOTS = 6
"""Buckets of gradients under way at a time: enough to keep the link busy while a rank is late."""


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
        dtype = partition.regions[bucket.region].dtype
        wire = wire_dtype_of(dtype, partition.node_size, wire_dtype)
        yield dtype, wire, partition.lane_cuts(bucket, node_rank)


def sends_grads(dtype: str, node_size: int, wire_dtype: str) -> bool:
    """Whether gradients travel as they are: there is nothing to add or to round."""
    return node_size == 1 and wire_dtype == dtype


def row_numel_between_nodes(numel: int, itemsize: int) -> int:
    """Elements from one node's part of a shard to the next, as [Note: staggered streams] wants."""
    return numel + STEP_NBYTES // itemsize
