"""What a kernel promises: the two passes over a shard that an optimizer step is made of."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.int64]

ALL_FINITE = -1


class Kernel(Protocol):
    """The passes over one shard; all arrays live where the kernel computes.

    Positions count elements from the start of the section. ``start`` and ``stop`` are multiples of
    ``CHUNK_NUMEL``; segments lie within [start, stop), in order and without overlap.

    [Note: the bits of a sum]
    Sources are summed as a pairwise tree in rank order, ((0+1)+(2+3))+(4+5), in the parameters'
    dtype, and every product keeps the order written in [Note: one formula, four schedules],
    without fused multiply-adds. An element's result therefore depends on its own inputs alone:
    not on its place in a vector, a block, a shard or a bucket, and not on the MPI in use.
    """

    def prepare(self, dtype: str) -> None:
        """Get ready for parameters of ``dtype``, so that the first step is as fast as the others.

        Raises:
            KernelError: There is no kernel for ``dtype``.
        """
        ...

    def update(
        self,
        grads: FloatArray,
        param: FloatArray,
        exp_avg: FloatArray,
        exp_avg_sq: FloatArray,
        plan: "UpdatePlan",
    ) -> int:
        """Sum the sources and apply NAdam to a shard, in one pass over memory.

        Args:
            grads: [num_sources, section_numel or more], C-contiguous; read only.
            param: [section_numel], updated within the segments.
            exp_avg: [shard_numel], updated; its first element belongs to position ``plan.start``.
            exp_avg_sq: [shard_numel], updated likewise.
            plan: Which runs to update with which coefficients.

        Returns:
            ``ALL_FINITE``, or the first position of a block in which a parameter became inf or NaN.
        """
        ...

    def reduce(
        self, grads: FloatArray, out: FloatArray, start: int, stop: int, square_sums: FloatArray
    ) -> None:
        """Sum the sources over [start, stop) into ``out`` and add up the squares of each chunk.

        Args:
            grads: [num_sources, section_numel or more], C-contiguous.
            out: [section_numel]; may be one of the rows of ``grads``.
            start: First position.
            stop: One past the last position.
            square_sums: [(stop - start) / CHUNK_NUMEL] float64, overwritten: the sum of squares of
                each chunk of the sum, in an order that depends on nothing else. Not finite if and
                only if a gradient of the chunk is not (or its square exceeds float64).
        """
        ...


class UpdatePlan:
    """The runs of one shard and the coefficients each is updated with.

    Attributes:
        start: First position of the shard.
        stop: One past its last position.
        segments: [num_segments, 3] int64: start, stop and row of ``coefficients``.
        coefficients: [num_cohorts, NUM_COEFFICIENTS] in the parameters' dtype.
    """

    __slots__ = ("coefficients", "segments", "start", "stop")

    def __init__(self, start: int, stop: int, segments: IntArray, coefficients: FloatArray) -> None:
        self.start = start
        self.stop = stop
        self.segments = segments
        self.coefficients = coefficients
