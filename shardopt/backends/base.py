"""The protocols of a backend: where arrays live, and what computes on them there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray, IntArray
from shardopt.layout.span import Span

if TYPE_CHECKING:
    from shardopt.comm.node_memory.arena import Arena, NodeMemory

ALL_FINITE = -1


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Arrays of one dtype and length, by address: the sources of a sum or the targets of a result.

    A kernel needs to know nothing else about a row, so rows may lie anywhere that its processor can
    address: in one matrix, in a staging buffer, in the memory of another GPU.

    Attributes:
        dtype: Dtype of every row.
        numel: Elements of every row.
        addresses: [num_rows] where each row begins, in bytes.
        owners: Whatever keeps the memory alive.
    """

    dtype: np.dtype[Any]
    numel: int
    addresses: IntArray
    owners: tuple[object, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, *arrays: FloatArray) -> "Rows":
        """Return arrays as rows, which keep them alive.

        Args:
            arrays: At least one; one-dimensional, contiguous, equal in dtype and size.
        """
        dtype, numel = arrays[0].dtype, arrays[0].size
        assert all(array.shape == (numel,) and array.dtype == dtype for array in arrays)
        assert all(array.flags.c_contiguous for array in arrays)
        addresses = np.array([array.ctypes.data for array in arrays], np.int64)
        return cls(dtype, numel, addresses, arrays)

    def __len__(self) -> int:
        return len(self.addresses)

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.dtype, self.numel, self.addresses[rows], self.owners)

    def part(self, span: Span) -> "Rows":
        """Return the elements of ``span``, counted from the first one, of every row."""
        assert 0 <= span.start <= span.stop <= self.numel
        addresses = self.addresses + span.start * self.dtype.itemsize
        return Rows(self.dtype, span.numel, addresses, self.owners)


@dataclass(frozen=True, slots=True, eq=False)
class UpdatePlan:
    """The part of a shard to update, and the coefficients of each segment of it.

    Positions count elements from the first one of the rows and of the state's arrays.

    Attributes:
        span: The elements to update; whole chunks.
        segments: [num_segments, 3]: start, stop and row of ``coefficients``, in order and without
            overlap. Only what lies within ``span`` is updated.
        coefficients: [num_cohorts, NUM_COEFFICIENTS] in the ``compute_dtype`` of the parameters.
    """

    span: Span
    segments: IntArray
    coefficients: FloatArray


class Kernel(Protocol):
    """The two passes over a shard; all arrays live where the kernel computes.

    [Note: the bits of a sum]
    Sources are summed as a pairwise tree in rank order, ((0+1)+(2+3))+(4+5), in the wider of the
    ``compute_dtype`` of the sources and that of the result; elements are widened before they are
    added. Every product keeps the order written in [Note: one formula, four schedules], without
    fused multiply-adds. An element's result therefore depends on its own inputs alone: not on its
    place in a vector, a block, a shard or a bucket, and not on the MPI library in use.

    The update is computed in the ``compute_dtype`` of the parameters: float32 for 16-bit ones. Then
    the formula's ``p`` is the master, or the parameter if it differs in any bit from the rounded
    master; see [Note: 16-bit parameters and masters]. The result is the new master and, rounded to
    the nearest with ties to even, the new parameter: a value too large for it becomes inf, and NaN
    stays NaN.

    Attributes:
        piece_numel: Elements that a call should cover at least, to be worth its overhead.
    """

    piece_numel: int

    def prepare(self, dtype: str, wire_dtype: str | None = None) -> None:
        """Compile and load what a step needs, so that the first one is as fast as the others.

        Args:
            dtype: Dtype of parameters and gradients.
            wire_dtype: Dtype that sums over a node are rounded to before they are sent to other
                nodes; None on a single node.

        Raises:
            KernelError: There is no kernel for ``dtype``.
        """
        ...

    def update(
        self, sources: Rows, targets: Rows, state: Mapping[str, FloatArray], plan: UpdatePlan
    ) -> int:
        """Sum the sources and apply NAdam to part of a shard, in one pass over memory.

        Args:
            sources: Gradients, which are only read: in the dtype of the parameters or in their
                ``compute_dtype``. None of them overlaps a target.
            targets: Copies of the parameters. The first is read; all are written.
            state: Arrays that begin where the rows do, in the ``compute_dtype`` of the parameters:
                ``exp_avg``, ``exp_avg_sq`` and, for 16-bit parameters, ``master``. Updated.
            plan: Which elements to update, and with which coefficients.

        Returns:
            ``ALL_FINITE``, or the first position of a block of at most ``CHUNK_NUMEL`` elements
            that holds the first parameter to become inf or NaN. If there are masters, the rounded
            parameters are what counts.
        """
        ...

    def reduce(
        self,
        sources: Rows,
        out: FloatArray | None,
        span: Span,
        square_sums: NDArray[np.float64] | None,
    ) -> None:
        """Sum the sources over ``span`` into ``out`` and add up the squares of each chunk.

        Args:
            sources: Gradients, which are only read.
            out: [span.numel], of any dtype, which the sums are rounded to; may be that part of one
                of the sources. None writes no sum and only measures. This is for 16-bit
                gradients, which could not hold the sum; the update then reads all the sources
                again.
            span: The elements to sum, counted from the first one of the sources; whole chunks.
            square_sums: [span.numel / CHUNK_NUMEL], overwritten with the sum of squares of each
                chunk of the sum, added up in a fixed order. An entry is not finite if and only if a
                gradient of the chunk is not, or their sum or its square overflows. None skips
                the squares.
        """
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...


class Event(Protocol):
    """A point in the work of a backend."""

    def is_done(self) -> bool:
        """Return whether all work up to this point is done; does not wait."""
        ...


class Backend(Protocol):
    """Where the large arrays live, and what computes there.

    A backend does its work in the order in which this rank asks for it.
    """

    @property
    def kernel(self) -> Kernel:
        """The kernel that updates arrays of this backend."""
        ...

    def zeros(self, numel: int, dtype: str, index: int, origin: FloatArray) -> FloatArray:
        """Allocate memory of this rank's own.

        Args:
            numel: Number of elements.
            dtype: Their dtype.
            index: Number of the array among those that are walked side by side; ``origin`` begins
                at number 0. See [Note: padding between arrays].
            origin: The first of them.
        """
        ...

    def share(self, arena: "Arena", nbytes: int, *, private: bool) -> "NodeMemory":
        """Allocate zeros that the ranks of a node share. Collective over the node.

        Args:
            arena: The memory of the node.
            nbytes: Length; the same on every rank.
            private: Whether each rank gets a view of its own to write to as well.
        """
        ...

    def copy(self, target: FloatArray, source: FloatArray) -> None:
        """Copy ``source`` to ``target``, of the same shape and dtype; either may be on the host."""
        ...

    def event(self) -> Event:
        """Return an event that is done once all work handed out so far is done."""
        ...

    def host(self, array: FloatArray) -> FloatArray:
        """Return the values of an array as a NumPy array that the host can read."""
        ...

    def close(self) -> None:
        """Release what the backend holds, its kernel included."""
        ...
