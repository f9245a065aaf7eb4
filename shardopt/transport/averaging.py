"""Averaged gradients: written into the rows of all ranks, and read by the owners of shards."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend, Rows, is_on_device
from shardopt.layout.partition import CHUNK_NUMEL, Partition
from shardopt.layout.span import Span
from shardopt.transport.buckets import BucketPlan
from shardopt.transport.reduction import PresentChunks

_PIECE_NUMEL = 16 * CHUNK_NUMEL  # of averages, which stay in cache while rows are written


class AveragedGrads:
    """The gradients of a node's ranks once each row holds the average over all ranks.

    [Note: averaged gradients]
    The owner of a shard adds up its gradients as a step would, multiplies the sum by one over the
    number of ranks, rounds the product to the dtype of gradients, and writes it into the rows of
    all ranks of its node. Nobody else reads or writes that part of the rows meanwhile. Between
    nodes the shards are all-gathered into one row of each node, and copied to its other rows; if
    rows are on devices, they travel through memory of the host, and are copied to all rows. From
    then on each rank may change its own row; the step takes for each shard what the row of its
    owner holds.

    Chunks without any parameter that has a gradient hold zeros, and are left alone.

    Args:
        backend: Adds up.
        node: This rank's node.
        node_rank: This rank on the node.
    """

    def __init__(self, backend: Backend, node: int, node_rank: int) -> None:
        self._backend = backend
        self._node = node
        self._own = slice(node_rank, node_rank + 1)
        self._chunks = PresentChunks()
        self._square_sums: NDArray[np.float64] = np.zeros(0)
        self._travelling: dict[int, FloatArray] = {}  # by number of the bucket

    def extend(self, partition: Partition) -> None:
        """Prepare for a larger partition."""
        self._backend.wait()
        self._travelling.clear()
        self._chunks.extend(partition)
        self._square_sums = self._backend.host_zeros(partition.numel // CHUNK_NUMEL, "float64")

    def write(
        self, plan: BucketPlan, span: Span, sources: Rows, present: int, factor: float
    ) -> None:
        """Write the average of a piece of this rank's shard into the rows of the node's ranks.

        Args:
            plan: The bucket.
            span: The piece, from the start of the shard.
            sources: The rows whose sum over all ranks it is, from the start of the shard.
            present: Bit mask of the parameters that have a gradient.
            factor: On the sum.
        """
        start, own = plan.shard.start, plan.buffers.row
        others = [row for row in plan.buffers.node_grads if row is not own]
        kernel = self._backend.kernel
        for part in self._chunks.within(plan.shard.region, span.shift(start), present):
            for piece in part.chunks(_PIECE_NUMEL):
                here, chunks = plan.buffers.local(piece).slice, _chunks(piece)
                squares = self._square_sums[chunks]  # the loop of steps computes them, too
                kernel.reduce(sources, own[here], piece.shift(-start), squares, factor)
                for row in others:
                    self._backend.copy(row[here], own[here])

    def depart(self, plan: BucketPlan) -> list[FloatArray]:
        """Return where a bucket's shards are sent from and received, by node.

        Args:
            plan: The bucket, of which this rank's shard is written.
        """
        shards = self._passage(plan)
        if plan.shard and is_on_device(plan.buffers.row):
            self._backend.copy(shards[self._node], plan.parts(plan.buffers.row)[self._node])
        return shards

    def spread(self, plan: BucketPlan, present: int) -> None:
        """Copy the shards that other nodes have sent to all rows of this node.

        Args:
            plan: The bucket.
            present: As for ``write``.
        """
        shards, own = self._passage(plan), plan.buffers.row
        is_there = not is_on_device(own)  # they were received into it
        rows = [row for row in plan.buffers.node_grads if not (is_there and row is own)]
        for node, shard in enumerate(plan.node_shards):
            if node == self._node or not rows:
                continue
            for part in self._chunks.within(plan.shard.region, shard, present):
                local, arrived = plan.buffers.local(part), shards[node]
                for row in rows:
                    self._backend.copy(row[local.slice], arrived[part.shift(-shard.start).slice])

    def sources(self, plan: BucketPlan) -> Rows:
        """Return what the update takes for this rank's shard of a bucket: its own row."""
        return plan.grads[self._own]

    def square_sums(self, plans: Sequence[BucketPlan], present: int) -> NDArray[np.float64]:
        """Return the sum of squares of each chunk that this rank owns.

        Args:
            plans: All buckets.
            present: As for ``write``.

        Returns:
            As ``Reduction.square_sums`` does.
        """
        square_sums = self._square_sums
        self._backend.wait()  # what ``write`` has computed
        square_sums[:] = 0.0
        for plan in plans:
            row = plan.buffers.all_grads[self._own]
            for part in self._chunks.within(plan.shard.region, plan.shard, present):
                squares = square_sums[_chunks(part)]
                self._backend.kernel.reduce(row, None, plan.buffers.local(part), squares)
        self._backend.wait()
        return square_sums

    def _passage(self, plan: BucketPlan) -> list[FloatArray]:
        """Return where the shards of a bucket travel, by node: in this rank's row, if it is home.

        It may be used again in another average: sums of that one are complete before, and so is all
        that a device was asked for earlier.
        """
        if not is_on_device(plan.buffers.row):
            return plan.parts(plan.buffers.row)
        lane, dtype = plan.lane_part, plan.buffers.region.dtype
        if plan.bucket not in self._travelling:
            self._travelling[plan.bucket] = self._backend.host_zeros(lane.numel, dtype)
        array = self._travelling[plan.bucket]
        return [array[shard.shift(-lane.start).slice] for shard in plan.node_shards]


def _chunks(span: Span) -> slice:
    """Return the chunks of a span among all of the flat index space."""
    return slice(span.start // CHUNK_NUMEL, span.stop // CHUNK_NUMEL)
