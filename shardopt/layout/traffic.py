"""Messages between nodes: their sizes and numbers, computed before anything is sent."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shardopt.layout.dtypes import wire_dtype_of
from shardopt.layout.padding import STEP_NBYTES
from shardopt.layout.partition import Partition
from shardopt.layout.span import Span

MIB = 1 << 20

NUM_STAGING_BUFFERS = 6
"""Buckets of gradients in transit at a time: enough to keep the link busy while a rank is late."""


def default_bucket_nbytes(num_nodes: int, world_size: int) -> int:
    """Return the bytes of parameters in a bucket where the policy does not say.

    On one node nothing is sent, and a bucket is the work of one kernel call. Between nodes small
    buckets keep the link busy from first to last, since a step ends when its last bucket has
    arrived; but each rank's part of one should be worth a message.
    """
    return 32 * MIB if num_nodes == 1 else max(4 * MIB, world_size * MIB // 16)


class Traffic(NamedTuple):
    """Gradients and parameters that a rank sends to other nodes in a step.

    Consensus messages of a few bytes are not counted.
    """

    nbytes: int
    messages: int


@dataclass(frozen=True)
class LanePart:
    """The part of a bucket that the ranks of one lane own.

    Attributes:
        dtype: Of its parameters.
        wire_dtype: In which sums of its gradients are sent.
        shards: The span that each node owns, in the flat index space.
    """

    dtype: str
    wire_dtype: str
    shards: tuple[Span, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.shards[-1].stop - self.shards[0].start


def lane_parts(
    partition: Partition, node_rank: int, wire_dtype: str | None, first: int = 0
) -> Iterator[LanePart]:
    """Yield a lane's part of each bucket, in flat order.

    Args:
        partition: The layout.
        node_rank: The lane.
        wire_dtype: As in ``ShardPolicy``.
        first: The bucket to begin with.
    """
    for bucket in partition.buckets[first:]:
        dtype = partition.regions[bucket.region].dtype
        wire = wire_dtype_of(dtype, partition.node_size, wire_dtype)
        yield LanePart(dtype, wire, partition.lane_shards(bucket, node_rank))


def plan_traffic(
    partition: Partition, node: int, node_rank: int, wire_dtype: str | None = None
) -> Traffic:
    """Compute the traffic of one rank in a step.

    Of each bucket a rank sends the others' shards of its lane part, summed over its node, and its
    own shard, updated, to each of the others; empty shards are not sent, nor are buckets whose
    parameters are all gone. Over all ranks of a node that is (M-1)/M of all gradients and (M-1)/M
    of all parameters, for M nodes.

    Args:
        partition: The layout.
        node: The rank's node.
        node_rank: The rank's lane.
        wire_dtype: As in ``ShardPolicy``.
    """
    nbytes = messages = 0
    others = partition.num_nodes - 1
    sent_buckets = set(partition.buckets_of((1 << len(partition.params)) - 1))
    for number, part in enumerate(lane_parts(partition, node_rank, wire_dtype)):
        if number not in sent_buckets:
            continue
        own = part.shards[node]
        sent = [shard for shard in part.shards if shard is not own]
        nbytes += sum(shard.numel for shard in sent) * np.dtype(part.wire_dtype).itemsize
        nbytes += own.numel * others * np.dtype(part.dtype).itemsize
        messages += sum(map(bool, sent)) + bool(own) * others
    return Traffic(nbytes, messages)


def plan_staging_buffer(
    partition: Partition,
    node: int,
    node_rank: int,
    wire_dtype: str | None,
    *,
    from_device: bool = False,
) -> tuple[int, int]:
    """Compute the bytes a rank needs for one bucket in transit: to send, and to receive.

    Args:
        partition: The layout.
        node: The rank's node.
        node_rank: The rank's lane.
        wire_dtype: As in ``ShardPolicy``.
        from_device: Whether gradients are on a device, which nothing is sent from.
    """
    send = receive = 0
    for part in lane_parts(partition, node_rank, wire_dtype):
        itemsize = np.dtype(part.wire_dtype).itemsize
        if from_device or not sends_grads(part.dtype, partition.node_size, part.wire_dtype):
            send = max(send, part.numel * itemsize)
        row = partial_row_numel(part.shards[node].numel, itemsize)
        receive = max(receive, partition.num_nodes * row * itemsize)
    return send, receive


def sends_grads(dtype: str, node_size: int, wire_dtype: str) -> bool:
    """Whether gradients are sent as they are, as there is nothing to add or to round."""
    return node_size == 1 and wire_dtype == dtype


def partial_row_numel(numel: int, itemsize: int) -> int:
    """Return the distance, in elements, between the partial sums that nodes send for one shard.

    See [Note: padding between arrays].
    """
    return numel + STEP_NBYTES // itemsize
