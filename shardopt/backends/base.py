"""The protocols of a backend: where arrays live, and what computes on them there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import Array, FloatArray, IntArray
from shardopt.layout.span import Span
from shardopt.layout.state_spec import FULL, StateForm
from shardopt.rule.rounding import Chance

if TYPE_CHECKING:
    from shardopt.comm.node_memory.arena import Arena
    from shardopt.layout.partition import Shard
    from shardopt.rule.cohorts import Cohorts

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
        addresses = np.array([address_of(array) for array in arrays], np.int64)
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


def address_of(array: Any) -> int:
    """Return where an array begins, in bytes; that of a device has an address there."""
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    address: int = array.__cuda_array_interface__["data"][0]
    return address


def is_on_device(array: object) -> bool:
    """Whether an array is in the memory of a device, where the host cannot read it."""
    return not isinstance(array, np.ndarray) and hasattr(array, "__cuda_array_interface__")


@dataclass(frozen=True, slots=True, eq=False)
class UpdatePlan:
    """The part of a shard to update, and the coefficients of each segment of it.

    Positions count elements from the first one of the rows and of the state's arrays.

    Attributes:
        span: The elements to update; whole chunks.
        segments: [num_segments, 3]: start, stop and row of ``coefficients``, in order and without
            overlap. Only what lies within ``span`` is updated.
        coefficients: [num_cohorts, NUM_COEFFICIENTS] in the ``compute_dtype`` of the parameters.
        origin: Position 0 in the flat index space.
        chance: What rounding by chance needs; None if nothing rounds so.
    """

    span: Span
    segments: IntArray
    coefficients: FloatArray
    origin: int = 0
    chance: Chance | None = None

    @classmethod
    def of(cls, rule: "Cohorts", shard: "Shard", span: Span, dtype: str) -> "UpdatePlan":
        """Return what a step that is planned does to a shard.

        Args:
            rule: Has planned the step.
            shard: The shard.
            span: The part to update, from the start of the shard.
            dtype: Of the coefficients.
        """
        segments, coefficients = rule.segments(shard), rule.coefficients(dtype)
        return cls(span, segments, coefficients, shard.start, rule.chance(shard))


class Kernel(Protocol):
    """The two passes over a shard; all arrays live where the kernel computes.

    [Note: the bits of a sum]
    Sources are summed as a pairwise tree in rank order, ((0+1)+(2+3))+(4+5), in the wider of the
    ``compute_dtype`` of the sources and that of the result; elements are widened before they are
    added. Every product keeps the order written in [Note: one formula], without
    fused multiply-adds. An element's result therefore depends on its own inputs alone: not on its
    place in a vector, a block, a shard or a bucket, and not on the MPI library in use.

    The update is computed in the ``compute_dtype`` of the parameters: float32 for 16-bit ones. Then
    the formula's ``p`` is the master, or the parameter if it differs in any bit from the rounded
    master; see [Note: 16-bit parameters and masters]. The result is the new master and, rounded to
    the nearest with ties to even, the new parameter: a value too large for it becomes inf, and NaN
    stays NaN. Without masters ``p`` is the parameter, and the result is rounded by chance: to its
    bits the upper half of the element's random number is added before the lower half of them is
    dropped. See [Note: random numbers of updates], and [Note: codes of 8 bits] about moments.

    Attributes:
        piece_numel: Elements that a call should cover at least, to be worth its overhead.
    """

    piece_numel: int

    def prepare(
        self,
        dtype: str,
        wire_dtype: str | None = None,
        num_nodes: int = 1,
        form: StateForm = FULL,
    ) -> None:
        """Compile and load what a step needs, so that the first one is as fast as the others.

        Args:
            dtype: Dtype of parameters and gradients.
            wire_dtype: Dtype that sums over a node are rounded to before they are sent to other
                nodes; None on a single node.
            num_nodes: Number of nodes.
            form: How the state is kept.

        Raises:
            KernelError: There is no kernel for ``dtype``.
        """
        ...

    def update(
        self, sources: Rows, targets: Rows, state: Mapping[str, FloatArray], plan: UpdatePlan
    ) -> None:
        """Sum the sources and apply an update to part of a shard, in one pass over memory.

        Args:
            sources: Gradients, which are only read: in the dtype of the parameters or in their
                ``compute_dtype``. None of them overlaps a target.
            targets: Copies of the parameters. The first is read; all are written.
            state: Arrays that begin where the rows do, as ``layout.state_spec`` lists them:
                ``exp_avg``, ``exp_avg_sq`` and, for most 16-bit parameters, ``master``. Updated.
            plan: Which elements to update, and with which coefficients.
        """
        ...

    def take_poisoned(self) -> int:
        """Return where updates since the last call have made parameters inf or NaN; does not wait.

        A device reports updates that it has not finished yet in a later call.

        Returns:
            ``ALL_FINITE``, or the first position, in the flat index space, of a block of at most
            ``CHUNK_NUMEL`` elements that holds the first such parameter. If there are masters, the
            rounded parameters are what counts.
        """
        ...

    def reduce(
        self,
        sources: Rows,
        out: FloatArray | None,
        span: Span,
        square_sums: NDArray[np.float64] | None,
        factor: float = 1.0,
    ) -> None:
        """Sum the sources over ``span`` into ``out`` and add up the squares of each chunk.

        Args:
            sources: Gradients, which are only read.
            out: [span.numel], of any dtype, which the sums are rounded to; may be that part of one
                of the sources. None writes no sum and only measures, for a single source, which is
                the sum.
            span: The elements to sum, counted from the first one of the sources; whole chunks.
            square_sums: [span.numel / CHUNK_NUMEL], overwritten with the sum of squares of each
                chunk of the sum, added up in a fixed order. An entry is not finite if and only if a
                gradient of the chunk is not, or their sum or its square overflows. None skips
                the squares.
            factor: The sum is multiplied by it before it is rounded into ``out``, and squared.
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

    def wait(self) -> None:
        """Wait until it is."""
        ...


class Backend(Protocol):
    """Where the arrays are that steps compute on, and what computes there.

    A backend does its work in the order in which this rank asks for it. Its arrays are NumPy's, or
    such as CuPy's: they can be sliced, reshaped and viewed, but their elements are the backend's.
    """

    @property
    def kernel(self) -> Kernel:
        """The kernel that updates arrays of this backend."""
        ...

    def host_zeros(self, numel: int, dtype: str) -> Array:
        """Allocate a NumPy array that the kernel addresses as well; the host waits to read it."""
        ...

    def copy(self, target: Array, source: Array) -> None:
        """Copy ``source`` to ``target``, of the same shape and dtype; either may be on the host.

        The target is contiguous; the source may have any strides, and be a framework's own.
        """
        ...

    def duplicate(self, array: Array) -> Array:
        """Return a copy of one of its arrays, in memory of its own."""
        ...

    def zero(self, array: Array) -> None:
        """Fill an array with zeros."""
        ...

    def scale(self, array: FloatArray, factor: float) -> None:
        """Multiply an array by a factor, in place."""
        ...

    def event(self) -> Event:
        """Return an event that is done once all work handed out so far is done."""
        ...

    def wait(self) -> None:
        """Wait until all work handed out so far is done."""
        ...

    def host(self, array: FloatArray) -> FloatArray:
        """Return the values of an array as a NumPy array; waits for them."""
        ...

    def close(self) -> None:
        """Release what the backend holds, its kernel included."""
        ...


class CopyQueue(Protocol):
    """Copies beside the work of a device, in an order of their own (in CUDA's words: a stream).

    The host never waits for a copy here; it asks an event. What is copied is on the device, or in
    pinned memory, and stays alive until its copy is done.
    """

    def fork(self) -> None:
        """Begin all copies from now on after the work that the device has been given so far."""
        ...

    def copy(self, target: Array, source: Array) -> None:
        """Copy ``source`` to ``target``, of the same shape and dtype; one of them is the host's."""
        ...

    def event(self) -> Event:
        """Return an event that is done once all copies so far are."""
        ...

    def join(self) -> None:
        """Begin all work that the device is given from now on after the copies so far."""
        ...


class Device(Backend, Protocol):
    """The backend of a device that has memory of its own, such as a GPU.

    [Note: order of devices]
    A device works in the order of one queue, the framework's current one (in CUDA's words: stream).
    Devices of several ranks are ordered by events, not by hosts that wait: a rank records an event
    with ``publish`` before it meets the others, and lets its device wait for theirs with
    ``acquire`` after that. All that a rank has handed to its device before the meeting is done
    before what any rank hands to its own after it. An event must have been recorded before another
    process waits for it, which is what the meeting is for.

    Attributes:
        has_peers: Whether the ranks of the node address each other's memory.
    """

    has_peers: bool

    def blocks(self, arena: "Arena", nbytes: int) -> Sequence[Array]:
        """Allocate zeros on the device of every rank of the node. Collective over the node.

        Args:
            arena: The memory of the node.
            nbytes: Length of each; the same on every rank.

        Returns:
            [nbytes] of bytes for each rank of the node, which this rank's device addresses. Without
            peers only that of this rank is one; the others are empty.
        """
        ...

    def zeros(self, nbytes: int) -> Array:
        """Allocate zeros on this rank's device, [nbytes] of bytes that no other addresses."""
        ...

    def pin(self, array: Array) -> None:
        """Make an array of node memory addressable by the device, for as long as the array lives.

        Collective over the node.
        """
        ...

    def copy_queue(self) -> CopyQueue:
        """Return a queue for copies beside the device's work; released with the device."""
        ...

    def publish(self) -> None:
        """Record that other ranks may see all work so far; see [Note: order of devices]."""
        ...

    def acquire(self) -> None:
        """Begin all work from now on after what other ranks have published."""
        ...

    def enter(self, queue: int) -> None:
        """Do all work from now on in a queue of the framework, after what it has been given.

        Args:
            queue: As the adapter returns it (in CUDA's words: the current stream).

        Raises:
            CallOrderError: The queue is being captured into a graph, which a step cannot be.
        """
        ...
