"""Messages between nodes: their sizes and numbers, computed before anything is sent."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shardopt.layout.dtypes import wire_dtype_of
from shardopt.layout.padding import STEP_NBYTES
from shardopt.layout.partition import CHUNK_NUMEL, Bucket, Partition
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

    It takes the same memory for every number of nodes.

    Attributes:
        dtype: Of its parameters.
        wire_dtype: In which sums of its gradients are sent.
        span: The part, in the flat index space.
        num_nodes: Nodes in the job.
    """

    dtype: str
    wire_dtype: str
    span: Span
    num_nodes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.span.numel

    @property
    def num_shards(self) -> int:
        """Number of nodes whose shard has elements."""
        return min(self.numel // CHUNK_NUMEL, self.num_nodes)

    @property
    def shards(self) -> tuple[Span, ...]:
        """The span that each node owns, in the flat index space."""
        return tuple(map(self.shard, range(self.num_nodes)))

    def shard(self, node: int) -> Span:
        """Return the span that one node owns, in the flat index space."""
        return self.span.cut(node, self.num_nodes, CHUNK_NUMEL)


def lane_parts(
    partition: Partition, node_rank: int, wire_dtype: str | None, first: int = 0
) -> Iterator[LanePart]:
    """Yield a lane's part of each bucket, in flat order.

    Args:
        partition: The layout.
        node_rank: The lane.
        wire_dtype: As ``layout.dtypes.wire_of`` returns it.
        first: The bucket to begin with.
    """
    for bucket in partition.buckets[first:]:
        yield _lane_part(partition, bucket, node_rank, wire_dtype)


def _lane_part(
    partition: Partition, bucket: Bucket, node_rank: int, wire_dtype: str | None
) -> LanePart:
    dtype = partition.regions[bucket.region].dtype
    wire = wire_dtype_of(dtype, partition.node_size, wire_dtype)
    span = bucket.lane_part(node_rank, partition.node_size)
    return LanePart(dtype, wire, span, partition.num_nodes)


def _kinds_of_buckets(
    partition: Partition, buckets: Iterable[Bucket]
) -> Iterable[tuple[Bucket, int]]:
    """Return a bucket of each size and dtype, and how many there are: they are cut alike."""
    regions = partition.regions
    kinds: dict[tuple[int, str], tuple[Bucket, int]] = {}
    for bucket in buckets:
        kind = bucket.numel, regions[bucket.region].dtype
        kinds[kind] = bucket, kinds.get(kind, (bucket, 0))[1] + 1
    return kinds.values()


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
        wire_dtype: As ``layout.dtypes.wire_of`` returns it.
    """
    nbytes = messages = 0
    others = partition.num_nodes - 1
    numbers = partition.buckets_of((1 << len(partition.params)) - 1)
    sent_buckets = (partition.buckets[number] for number in numbers)
    for bucket, count in _kinds_of_buckets(partition, sent_buckets):
        part = _lane_part(partition, bucket, node_rank, wire_dtype)
        own = part.shard(node)
        nbytes += count * (part.numel - own.numel) * np.dtype(part.wire_dtype).itemsize
        nbytes += count * own.numel * others * np.dtype(part.dtype).itemsize
        messages += count * (part.num_shards - bool(own) + bool(own) * others)
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
        wire_dtype: As ``layout.dtypes.wire_of`` returns it.
        from_device: Whether gradients are on a device or in a ring, which nothing is sent from.
    """
    send = receive = 0
    for bucket, _ in _kinds_of_buckets(partition, partition.buckets):
        part = _lane_part(partition, bucket, node_rank, wire_dtype)
        itemsize = np.dtype(part.wire_dtype).itemsize
        if from_device or not sends_grads(part.dtype, partition.node_size, part.wire_dtype):
            send = max(send, part.numel * itemsize)
        row = partial_row_numel(part.shard(node).numel, itemsize)
        receive = max(receive, partition.num_nodes * row * itemsize)
    return send, receive


def staging_node_nbytes(
    partition: Partition, wire_dtype: str | None, *, from_device: bool = False
) -> int:
    """Compute the bytes of one staging buffer of each rank, on the node with the largest shards.

    Args:
        partition: The layout, of several nodes.
        wire_dtype: As ``layout.dtypes.wire_of`` returns it.
        from_device: As for ``plan_staging_buffer``.
    """
    last = partition.num_nodes - 1
    lanes = range(partition.node_size)
    staging = [
        plan_staging_buffer(partition, last, lane, wire_dtype, from_device=from_device)
        for lane in lanes
    ]
    return sum(map(sum, staging))


def sends_grads(dtype: str, node_size: int, wire_dtype: str) -> bool:
    """Whether gradients are sent as they are, as there is nothing to add or to round."""
    return node_size == 1 and wire_dtype == dtype


def partial_row_numel(numel: int, itemsize: int) -> int:
    """Return the distance, in elements, between the partial sums that nodes send for one shard.

    See [Note: padding between arrays].
    """
    return numel + STEP_NBYTES // itemsize
