"""Averaged gradients: written into the rows of all ranks, and read by the owners of shards."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardopt.backends.base import Kernel, Rows
from shardopt.layout.dtypes import compute_dtype
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
    nodes the shards are all-gathered into one row of each node, and copied to its other rows. From
    then on each rank may change its own row; the step takes for each shard what the row of its
    owner holds.

    Chunks without any parameter that has a gradient hold zeros, and are left alone.

    Args:
        kernel: Adds up.
        node: This rank's node.
        node_rank: This rank on the node.
    """

    def __init__(self, kernel: Kernel, node: int, node_rank: int) -> None:
        self._kernel = kernel
        self._node = node
        self._own = slice(node_rank, node_rank + 1)
        self._chunks = PresentChunks()
        self._num_chunks = 0

    def extend(self, partition: Partition) -> None:
        """Prepare for a larger partition."""
        self._chunks.extend(partition)
        self._num_chunks = partition.numel // CHUNK_NUMEL

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
        start = plan.shard.start
        dtype = np.dtype(compute_dtype(plan.buffers.region.dtype))
        for part in self._chunks.within(plan.shard.region, span.shift(start), present):
            for piece in part.chunks(_PIECE_NUMEL):
                average = np.empty(piece.numel, dtype)
                squares = np.empty(piece.numel // CHUNK_NUMEL)  # the step's loop computes them, too
                self._kernel.reduce(sources, average, piece.shift(-start), squares)
                with np.errstate(over="ignore", invalid="ignore"):  # for check_finite to find
                    average *= dtype.type(factor)
                    for row in plan.buffers.node_grads:
                        row[plan.buffers.local(piece).slice] = average

    def spread(self, plan: BucketPlan, present: int) -> None:
        """Copy the shards of other nodes from this rank's row to those of the node's other ranks.

        Args:
            plan: The bucket.
            present: As for ``write``.
        """
        own = plan.buffers.grads
        others = [row for row in plan.buffers.node_grads if row is not own]
        for node, shard in enumerate(plan.node_shards):
            if node == self._node or not others:
                continue
            for part in self._chunks.within(plan.shard.region, shard, present):
                local = plan.buffers.local(part).slice
                for row in others:
                    row[local] = own[local]

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
        square_sums = np.zeros(self._num_chunks)
        for plan in plans:
            row = plan.buffers.all_grads[self._own]
            for part in self._chunks.within(plan.shard.region, plan.shard, present):
                chunks = slice(part.start // CHUNK_NUMEL, part.stop // CHUNK_NUMEL)
                self._kernel.reduce(row, None, plan.buffers.local(part), square_sums[chunks])
        return square_sums
