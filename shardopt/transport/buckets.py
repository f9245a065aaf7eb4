"""Buckets as the ranks of one lane see them, and the memory for those in transit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend, Rows, is_on_device
from shardopt.layout.partition import CHUNK_NUMEL, Partition, Shard
from shardopt.layout.span import Span
from shardopt.layout.traffic import lane_parts, partial_row_numel, sends_grads
from shardopt.store.buffers import ShardBuffers


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """One bucket, as the ranks of this lane see it.

    Attributes:
        bucket: Its number in the partition.
        buffers: The memory of its region.
        shard: The shard of this rank.
        node_shards: The spans that the ranks of the lane own, by node, in the flat index space.
        wire_dtype: In which sums of gradients are sent.
        grads: The gradients of all ranks of the node for this rank's shard.
        targets: The copies of the parameters in this rank's shard.
        mean_scale: The factor that makes averages of sums over all ranks.
    """

    bucket: int
    buffers: ShardBuffers
    shard: Shard
    node_shards: tuple[Span, ...]
    wire_dtype: str
    grads: Rows
    targets: Rows
    mean_scale: float

    @property
    def lane_part(self) -> Span:
        """The part of the bucket that the lane owns."""
        return Span(self.node_shards[0].start, self.node_shards[-1].stop)

    def trace_args(self) -> Mapping[str, object]:
        """Return what a trace shows of it: its number, and the bytes of this lane's parameters."""
        nbytes = self.lane_part.numel * np.dtype(self.buffers.region.dtype).itemsize
        return {"bucket": self.bucket, "bytes": nbytes}

    @property
    def sums(self) -> FloatArray:
        """[shard.numel] the sums of this rank's shard, once there are any."""
        return self.buffers.sums_of(self.shard)

    @property
    def sends_grads(self) -> bool:
        """See ``layout.traffic.sends_grads``; from a device nothing is sent."""
        dtype, node_size = self.buffers.region.dtype, len(self.buffers.all_grads)
        is_at_home = not is_on_device(self.buffers.row)
        return is_at_home and sends_grads(dtype, node_size, self.wire_dtype)

    @property
    def chunks(self) -> slice:
        """The chunks of this rank's shard, among all of the flat index space."""
        return slice(self.shard.start // CHUNK_NUMEL, self.shard.stop // CHUNK_NUMEL)

    def parts(self, array: FloatArray) -> list[FloatArray]:
        """Return the parts of an array of the region that the ranks of the lane own, by node.

        Args:
            array: [region_numel], such as the parameters.
        """
        return [array[self.buffers.local(shard).slice] for shard in self.node_shards]


def plan_buckets(
    partition: Partition,
    buffers: Sequence[ShardBuffers],
    node_rank: int,
    wire_dtype: str | None,
    first: int = 0,
) -> list[BucketPlan]:
    """Lay out buckets in flat order.

    Args:
        partition: The layout.
        buffers: Of each region.
        node_rank: The lane.
        wire_dtype: As ``layout.dtypes.wire_of`` returns it.
        first: The bucket to begin with, the first one of a region.
    """
    shards: dict[int, Iterator[Shard]] = {}
    buckets, plans = partition.buckets[first:], []
    mean_scale = 1.0 / partition.world_size
    parts = lane_parts(partition, node_rank, wire_dtype, first)
    for number, (bucket, part) in enumerate(zip(buckets, parts, strict=True), first):
        memory = buffers[bucket.region]
        shard = next(shards.setdefault(bucket.region, iter(memory.shards)))
        rows = memory.sources(shard), memory.targets(shard)
        of_part = part.shards, part.wire_dtype
        plans.append(BucketPlan(number, memory, shard, *of_part, *rows, mean_scale))
    return plans


class StagingBuffer:
    """Memory for one bucket of gradients in transit; the bucket that took it last owns it.

    Args:
        backend: Computes sums in it.
        send_nbytes: See ``layout.traffic.plan_staging_buffer``.
        receive_nbytes: Likewise.
    """

    def __init__(self, backend: Backend, send_nbytes: int, receive_nbytes: int) -> None:
        self._send = backend.host_zeros(send_nbytes, "uint8")
        self._receive = backend.host_zeros(receive_nbytes, "uint8")

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self._send.nbytes + self._receive.nbytes

    def sums(self, plan: BucketPlan, node: int) -> FloatArray:
        """Return the place for this node's sum of the shard that another node owns."""
        itemsize = np.dtype(plan.wire_dtype).itemsize
        span = plan.node_shards[node].shift(-plan.lane_part.start)
        return self._send[span.start * itemsize : span.stop * itemsize].view(plan.wire_dtype)

    def partials(self, plan: BucketPlan) -> list[FloatArray]:
        """Return the places for all nodes' sums of this rank's shard, by node."""
        itemsize, numel = np.dtype(plan.wire_dtype).itemsize, plan.shard.numel
        row = partial_row_numel(numel, itemsize) * itemsize
        return [
            self._receive[node * row : node * row + numel * itemsize].view(plan.wire_dtype)
            for node in range(len(plan.node_shards))
        ]
