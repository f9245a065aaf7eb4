"""The CUDA backend: arrays on a GPU, which the ranks of a node share."""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from shardopt._typing import Array, FloatArray
from shardopt.backends.base import Event, Rows, address_of, is_on_device
from shardopt.backends.cuda.gpu import Gpu
from shardopt.backends.cuda.node_gpus import NodeGpus, first_error, require_room
from shardopt.backends.cuda.peers import Peers
from shardopt.backends.cuda.probing import try_peers
from shardopt.backends.cuda.software import examine_software
from shardopt.comm.consensus import attempt
from shardopt.comm.exit_hook import ExitHook
from shardopt.comm.node_memory.arena import Arena
from shardopt.errors import CallOrderError, KernelError, SharedMemoryError
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span

_ALIGNMENT_NBYTES = 16  # of what the kernel reads and writes at once


class CudaBackend:
    """Computes on a GPU; implements ``Device``.

    Collective over the node: construction.

    Args:
        gpu: That of this rank.
        arena: The memory of the node.
        peers: How its ranks exchange what is on their GPUs.

    Attributes:
        has_peers: See ``Device``.
        why_staged: Why it has none, in sentences for users; empty if it has.
        kernel: The kernel that updates arrays of this backend.

    Raises:
        KernelError: Some rank cannot wait for the others' events; on every rank.
    """

    def __init__(self, gpu: Gpu, arena: Arena, peers: Peers) -> None:
        self.has_peers = peers.is_direct
        self.why_staged = peers.reason
        self._gpu = gpu
        self._comm = arena.comm
        self._queue = 0
        self._pinned: weakref.WeakSet[Any] = weakref.WeakSet()
        self._scratch: dict[np.dtype[Any], FloatArray] = {}
        self._mark: Any = None
        self._peer_marks: Sequence[Any] = ()
        if self.has_peers and arena.comm.size > 1:
            self._mark, self._peer_marks = NodeGpus.of(arena).exchange_marks(gpu)
        self._exit = ExitHook(self, gpu.synchronize)  # before what peers write to ends with them
        self.kernel = gpu.make_kernel(arena.comm.size, is_staged=not self.has_peers)

    # -- memory ------------------------------------------------------------------------------------

    def blocks(self, arena: Arena, nbytes: int) -> Sequence[Array]:
        """See ``Device.blocks``.

        Raises:
            SharedMemoryError: There is no room on the GPU of some rank; on every rank.
        """
        comm = arena.comm
        if self._mark is not None:
            return NodeGpus.of(arena).allocate(self._gpu, nbytes)
        own, error = attempt(self.zeros, nbytes)
        require_room(comm, error, nbytes)
        assert own is not None
        return [own if rank == comm.rank else own[:0] for rank in range(comm.size)]

    def zeros(self, nbytes: int) -> Array:
        """See ``Device.zeros``."""
        memory = self._gpu.allocate(max(1, nbytes))
        return self._gpu.array(memory.ptr, nbytes, memory)

    def host_zeros(self, numel: int, dtype: str) -> Array:
        """See ``Backend.host_zeros``."""
        nbytes = numel * np.dtype(dtype).itemsize
        array = self._gpu.pinned(max(1, nbytes))[:nbytes].view(dtype)
        array[...] = 0
        return array

    def pin(self, array: Array) -> None:
        """See ``Device.pin``; pins all of the range of node memory that the array is part of.

        Raises:
            SharedMemoryError: The system does not let some rank do so; on every rank.
        """
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = array = owner.base
        owner = array if array.base is None else array.base
        if not array.nbytes or owner in self._pinned:
            return
        address = array.ctypes.data
        _, error = attempt(self._gpu.register, address, array.nbytes)
        if error is None:
            self._pinned.add(owner)
            weakref.finalize(owner, _unpin, self._gpu, address).atexit = False
        if first := first_error(self._comm, error):
            raise SharedMemoryError(
                f"{array.nbytes:,} bytes of the node's memory must be pinned for the GPU; got "
                f"{first}. Lift the limit (ulimit -l unlimited, docker run --ulimit memlock=-1)."
            ) from error

    # -- work --------------------------------------------------------------------------------------

    def copy(self, target: Array, source: Array) -> None:
        """See ``Backend.copy``; the source may have any strides, and be another library's.

        CUDA may read memory of the host later, so a temporary copy there is waited for.
        """
        assert target.shape == source.shape
        assert target.dtype == source.dtype
        assert _is_dense(target)
        if not target.size:
            return
        is_temporary = not _is_dense(source)
        if is_temporary:
            source = self.dense(source)
        self._gpu.copy(address_of(target), address_of(source), target.nbytes)
        if is_temporary and not is_on_device(source):
            self._gpu.synchronize()

    def dense(self, array: Array) -> Array:
        """Return a contiguous copy of an array, where it is."""
        return self._gpu.dense(array) if is_on_device(array) else np.ascontiguousarray(array)

    def duplicate(self, array: Array) -> Array:
        """See ``Backend.duplicate``."""
        return self._gpu.duplicate(array)

    def zero(self, array: Array) -> None:
        """See ``Backend.zero``."""
        if array.size:
            self._gpu.zero(array)

    def scale(self, array: FloatArray, factor: float) -> None:
        """See ``Backend.scale``.

        The kernel's sum of a single source has the bits of the product on CPUs. It takes whole
        chunks, so what is less passes through one.
        """
        dtype = array.dtype
        factor = float(dtype.type(factor))
        is_aligned = address_of(array) % _ALIGNMENT_NBYTES == 0 if array.size else True
        whole = array.size // CHUNK_NUMEL * CHUNK_NUMEL if is_aligned else 0
        self._scale_chunks(array[:whole], factor)
        for start in range(whole, array.size, CHUNK_NUMEL):
            part = array[start : start + CHUNK_NUMEL]
            if dtype not in self._scratch:
                self._scratch[dtype] = self.zeros(CHUNK_NUMEL * dtype.itemsize).view(dtype)
            chunk = self._scratch[dtype]
            self.copy(chunk[: part.size], part)
            self._scale_chunks(chunk, factor)
            self.copy(part, chunk[: part.size])

    def _scale_chunks(self, array: FloatArray, factor: float) -> None:
        if array.size:
            self.kernel.reduce(Rows.of(array), array, Span(0, array.size), None, factor)

    def host(self, array: FloatArray) -> FloatArray:
        """See ``Backend.host``."""
        values = np.empty(array.shape, array.dtype)
        self.copy(values, array)
        self.wait()
        return values

    # -- order -------------------------------------------------------------------------------------

    def event(self) -> Event:
        """See ``Backend.event``."""
        return self._gpu.record()

    def wait(self) -> None:
        """See ``Backend.wait``."""
        self._gpu.synchronize()

    def publish(self) -> None:
        """See ``Device.publish``; what passes through the host must be there."""
        if not self.has_peers:
            self._gpu.synchronize()
        elif self._mark is not None:
            self._gpu.record_mark(self._mark)

    def acquire(self) -> None:
        """See ``Device.acquire``."""
        for mark in self._peer_marks:
            self._gpu.wait_for(mark)

    def enter(self, queue: int) -> None:
        """See ``Device.enter``."""
        if self._gpu.is_capturing(queue):
            raise CallOrderError(
                "the optimizer must be called outside of CUDA graphs; got a stream that is being "
                "captured. Capture forward and backward only: a step waits for other ranks."
            )
        if queue == self._queue:
            return
        so_far = self._gpu.record()
        self._gpu.use(queue)
        self._gpu.wait_for(so_far)
        self._queue = queue

    def copy_queue(self) -> "CudaCopies":
        """Return a queue for copies beside the device's work; released with the device."""
        return CudaCopies(self._gpu)

    def close(self) -> None:
        """See ``Backend.close``; memory of CuPy's pool goes to others once no work uses it."""
        self._gpu.synchronize()
        self._scratch.clear()
        self.kernel.close()


class CudaCopies:
    """Copies beside the work of a GPU, in a stream of their own; the host waits for none.

    What is copied is on the GPU or in pinned memory, and stays alive until its copy is done.

    Args:
        gpu: Has the work.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._side = gpu.side()

    def fork(self) -> None:
        """Begin all copies from now on after the work that the GPU has been given so far."""
        self._side.wait_for(self._gpu.record())

    def copy(self, target: Array, source: Array) -> None:
        """Copy ``source`` to ``target``, of the same shape and dtype, and both contiguous."""
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        assert _is_dense(target)
        assert _is_dense(source)
        if target.size:
            self._side.copy(address_of(target), address_of(source), target.nbytes)

    def event(self) -> Event:
        """Return an event that is done once all copies so far are."""
        return self._side.record()

    def join(self) -> None:
        """Begin all work that the GPU is given from now on after the copies so far."""
        self._gpu.wait_for(self._side.record())


def make_backend(number: int, arena: Arena) -> CudaBackend:
    """Return a GPU of this process as the backend of this rank.

    Collective over the node.

    Args:
        number: Of the GPU, among those that this process sees.
        arena: The memory of the node.

    Raises:
        KernelError: Some rank of the node cannot use its GPU; on every rank.
    """
    gpu, error = attempt(_open_gpu, number)
    if first := first_error(arena.comm, error):
        raise KernelError(first) from error
    assert gpu is not None
    return CudaBackend(gpu, arena, try_peers(arena.comm, number))


def _open_gpu(number: int) -> Gpu:
    """Return a GPU.

    Raises:
        KernelError: The software for it is missing, or too old.
    """
    if problem := examine_software().problem:
        raise KernelError(
            f"parameters on a GPU must be updated there; got a process that cannot. {problem}"
        )
    from shardopt.backends.cuda.cupy_gpu import CupyGpu

    return CupyGpu(number)


def _unpin(gpu: Gpu, address: int) -> None:
    """Unpin memory once no work uses it."""
    gpu.synchronize()
    gpu.unregister(address)


def _is_dense(array: Any) -> bool:
    """Whether an array is contiguous, in the order of its elements."""
    if isinstance(array, np.ndarray):
        return array.flags.c_contiguous
    return not array.size or array.__cuda_array_interface__.get("strides") is None
