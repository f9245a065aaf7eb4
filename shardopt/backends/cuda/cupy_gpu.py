"""A GPU by CuPy: the only file, beside ``device`` and ``probing``, that needs one to run.

CuPy keeps a current device and a current stream for each thread. They are set around each call
rather than once, so that the user's own stay as they are, and any thread may call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

from shardopt._typing import Array
from shardopt.backends.base import Kernel
from shardopt.backends.cuda.device import CudaDevice
from shardopt.backends.cuda.kernel import CudaKernel

_PORTABLE_AND_MAPPED = 3  # flags of cudaHostRegister and cudaHostAlloc; CuPy names half of them
_NOT_READY = 600  # cudaErrorNotReady


class CupyGpu:
    """See ``Gpu``.

    Args:
        number: Of the GPU, among those that this process sees.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._device = cupy.cuda.Device(number)
        self._stream: Any = None
        self.use(0)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this GPU and the stream CuPy's current ones."""
        with self._device, self._stream:
            yield

    def use(self, stream: int) -> None:
        """See ``Gpu.use``; the user's own CuPy stream is kept alive.

        The default stream goes by its other name, as CuPy may take 0 for that of each thread.
        """
        address = stream or runtime.streamLegacy
        with self._device:
            own = cupy.cuda.get_current_stream()
            external = cupy.cuda.Stream.from_external
            self._stream = own if own.ptr == address else external(_Stream(address))

    def is_capturing(self, stream: int) -> bool:
        """See ``Gpu.is_capturing``."""
        with self._device:
            return bool(runtime.streamIsCapturing(stream))

    def record(self) -> "_Event":
        """See ``Gpu.record``."""
        with self._device:
            return _Event(self._stream.record(cupy.cuda.Event(disable_timing=True)))

    def synchronize(self) -> None:
        """See ``Gpu.synchronize``."""
        with self._device:
            self._stream.synchronize()

    def wait_for(self, event: Any) -> None:
        """See ``Gpu.wait_for``."""
        with self._device:
            address = event if isinstance(event, int) else event.ptr
            runtime.streamWaitEvent(self._stream.ptr, address, 0)

    def side(self) -> "CupyGpu":
        """See ``Gpu.side``; the stream waits for no other unless it is told to."""
        side = CupyGpu(self.number)
        with self._device:
            side._stream = cupy.cuda.Stream(non_blocking=True)
        return side

    def allocate(self, nbytes: int) -> Any:
        """See ``Gpu.allocate``; neither a pool nor the driver's asynchronous one has handles."""
        with self.current():
            memory = cupy.cuda.Memory(nbytes)
            runtime.memsetAsync(memory.ptr, 0, nbytes, self._stream.ptr)
            self._stream.synchronize()
            return memory

    def array(self, address: int, nbytes: int, owner: object) -> Array:
        """See ``Gpu.array``."""
        with self._device:
            memory = cupy.cuda.UnownedMemory(address, nbytes, owner, self.number)
            array: Array = cupy.ndarray(nbytes, np.uint8, cupy.cuda.MemoryPointer(memory, 0))
            return array

    def dense(self, array: Array) -> Array:
        """See ``Gpu.dense``."""
        with self.current():
            copy: Array = _bits(array).copy()
            return copy

    def duplicate(self, array: Array) -> Array:
        """See ``Gpu.duplicate``."""
        with self.current():
            return array.copy()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """See ``Gpu.copy``."""
        with self._device:
            kind = runtime.memcpyDefault
            runtime.memcpyAsync(target, source, nbytes, kind, self._stream.ptr)

    def zero(self, array: Array) -> None:
        """See ``Gpu.zero``."""
        with self.current():
            _bits(array).fill(0)

    def pinned(self, nbytes: int) -> Array:
        """See ``Gpu.pinned``; CuPy's pool would hand it on while copies are under way."""
        with self._device:
            memory = cupy.cuda.PinnedMemory(nbytes, _PORTABLE_AND_MAPPED)
            return np.frombuffer(cupy.cuda.PinnedMemoryPointer(memory, 0), np.uint8, nbytes)

    def register(self, address: int, nbytes: int) -> None:
        """See ``Gpu.register``."""
        with self._device:
            runtime.hostRegister(address, nbytes, _PORTABLE_AND_MAPPED)

    def unregister(self, address: int) -> None:
        """See ``Gpu.unregister``."""
        with self._device:
            runtime.hostUnregister(address)

    def export(self, memory: Any) -> bytes:
        """See ``Gpu.export``."""
        with self._device:
            handle: bytes = runtime.ipcGetMemHandle(memory.ptr)
            return handle

    def open(self, handle: bytes) -> int:
        """See ``Gpu.open``; enables access between the two GPUs."""
        with self._device:
            return int(runtime.ipcOpenMemHandle(handle))

    def close(self, address: int) -> None:
        """See ``Gpu.close``."""
        with self._device:
            runtime.ipcCloseMemHandle(address)

    def mark(self) -> tuple[Any, bytes]:
        """See ``Gpu.mark``."""
        with self._device:
            event = cupy.cuda.Event(disable_timing=True, interprocess=True)
            return event, runtime.ipcGetEventHandle(event.ptr)

    def record_mark(self, mark: Any) -> None:
        """See ``Gpu.record_mark``."""
        with self._device:
            self._stream.record(mark)

    def open_mark(self, handle: bytes) -> Any:
        """See ``Gpu.open_mark``."""
        with self._device:
            return int(runtime.ipcOpenEventHandle(handle))

    def make_kernel(self, node_size: int, *, is_staged: bool) -> Kernel:
        """See ``Gpu.make_kernel``."""
        with self.current():
            return CudaKernel(CudaDevice(self.current), node_size, is_staged=is_staged)


class _Stream:
    """A stream of another library, under the protocol that CuPy takes it by."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


class _Event:
    """See ``Event``."""

    def __init__(self, event: Any) -> None:
        self.ptr: int = event.ptr
        self._event = event

    def is_done(self) -> bool:
        """See ``Event.is_done``; CuPy takes an error for work that is not done."""
        status = runtime.eventQuery(self.ptr)
        if status not in (0, _NOT_READY):
            raise runtime.CUDARuntimeError(status)
        return bool(status == 0)

    def wait(self) -> None:
        """See ``Event.wait``."""
        self._event.synchronize()


def current_stream(number: int) -> int:
    """Return the stream that is CuPy's current one on a GPU, in this thread."""
    return int(cupy.cuda.get_current_stream(number).ptr)


def _bits(array: Any) -> Any:
    """Return an array as integers, as CuPy computes with few dtypes of 16 bits."""
    return cupy.asarray(array).view(f"u{array.itemsize}")
