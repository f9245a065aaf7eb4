"""What a kernel promises: the two passes over a shard that an optimizer step is made of."""

from typing import Protocol

from shardopt._typing import FloatArray, IntArray

ALL_FINITE = -1


class Kernel(Protocol):
    """The passes over one shard; all arrays live where the kernel computes.

    Positions count elements from the start of the region. ``start`` and ``stop`` are multiples of
    ``CHUNK_NUMEL``; segments lie within [start, stop), in order and without overlap.

    [Note: the bits of a sum]
    Sources are summed as a pairwise tree in rank order, ((0+1)+(2+3))+(4+5), in the dtype that is
    computed in, and every product keeps the order written in [Note: one formula, four schedules],
    without fused multiply-adds. An element's result therefore depends on its own inputs alone:
    not on its place in a vector, a block, a shard or a bucket, and not on the MPI in use.

    That dtype is ``compute_dtype`` of the parameters': float32 for 16-bit ones, which are widened
    as they are read. Then the formula's ``p`` is the master, or the parameter if it differs in any
    bit from the rounded master; see [Note: sixteen bits and a master]. The result is the new
    master and, rounded to the nearest with ties to even, the new parameter: what is too large for
    it becomes inf, and NaN stays NaN.

    Attributes:
        piece_numel: Elements that a call should be given at least, to be worth its while.
    """

    piece_numel: int

    def prepare(self, dtype: str, wire_dtype: str | None = None) -> None:
        """Get ready for parameters of ``dtype``, so that the first step is as fast as the others.

        Args:
            dtype: What parameters and gradients have.
            wire_dtype: What sums over a node are rounded to; None where there is but one node.

        Raises:
            KernelError: There is no kernel for ``dtype``.
        """
        ...

    def update(
        self,
        grads: FloatArray,
        param: FloatArray,
        master: FloatArray | None,
        exp_avg: FloatArray,
        exp_avg_sq: FloatArray,
        plan: "UpdatePlan",
    ) -> int:
        """Sum the sources and apply NAdam to a shard, in one pass over memory.

        Args:
            grads: [num_sources, numel of the sources], C-contiguous, read only: in the dtype of
                ``param`` or that which is computed in. Its first column belongs to position
                ``plan.sources_start``.
            param: [section_numel], updated within the segments.
            master: [shard_numel] float32, updated likewise; its first element belongs to position
                ``plan.start``. None unless parameters have 16 bits.
            exp_avg: [shard_numel] in the dtype that is computed in, updated likewise.
            exp_avg_sq: [shard_numel], like ``exp_avg``.
            plan: Which runs to update with which coefficients.

        Returns:
            ``ALL_FINITE``, or the first position of a block of at most ``CHUNK_NUMEL`` in which a
            parameter became inf or NaN. With a master, it is the rounded parameter that counts.
        """
        ...

    def reduce(
        self,
        grads: FloatArray,
        out: FloatArray | None,
        start: int,
        stop: int,
        square_sums: FloatArray | None,
    ) -> None:
        """Sum the sources over [start, stop) into ``out`` and add up the squares of each chunk.

        Args:
            grads: [num_sources, numel of the sources], C-contiguous.
            out: [stop - start], of any dtype, which sums are rounded to; may be that part of one of
                the rows of ``grads``. None writes no sum and only measures: so it is for 16-bit
                gradients, which could not hold the sum; the update then reads all the sources
                again.
            start: First position, counted from the first column of ``grads``.
            stop: One past the last position.
            square_sums: [(stop - start) / CHUNK_NUMEL] float64, overwritten: the sum of squares of
                each chunk of the sum, in an order that depends on nothing else. Not finite if and
                only if a gradient of the chunk is not, or their sum or its square overflows.
                None does without.
        """
        ...


class UpdatePlan:
    """The runs of one shard and the coefficients each is updated with.

    Attributes:
        start: First position of the shard.
        stop: One past its last position.
        segments: [num_segments, 3] int64: start, stop and row of ``coefficients``.
        coefficients: [num_cohorts, NUM_COEFFICIENTS] in the dtype that is computed in.
        sources_start: Position that the first column of the sources belongs to.
    """

    __slots__ = ("coefficients", "segments", "sources_start", "start", "stop")

    def __init__(
        self,
        start: int,
        stop: int,
        segments: IntArray,
        coefficients: FloatArray,
        sources_start: int = 0,
    ) -> None:
        self.start = start
        self.stop = stop
        self.segments = segments
        self.coefficients = coefficients
        self.sources_start = sources_start
