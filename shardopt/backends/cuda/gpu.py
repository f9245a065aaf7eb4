"""The calls of CUDA's runtime that the backend is made of."""

from typing import Any, Protocol

from shardopt._typing import Array
from shardopt.backends.base import Event, Kernel


class Gpu(Protocol):
    """A GPU of this process, and the stream on it that work goes to.

    Everything but ``allocate``, ``pinned`` and ``synchronize`` returns before it is done. Calls may
    raise any exception.

    Attributes:
        number: Among the devices that this process sees.
    """

    number: int

    # -- order -------------------------------------------------------------------------------------

    def use(self, stream: int) -> None:
        """Send all work to a stream from now on; it must live until the next call."""
        ...

    def is_capturing(self, stream: int) -> bool:
        """Whether work in a stream is recorded into a graph rather than done."""
        ...

    def record(self) -> Event:
        """Return an event that is done once all work so far is."""
        ...

    def synchronize(self) -> None:
        """Wait until all work so far is done."""
        ...

    def wait_for(self, event: Any) -> None:
        """Begin all later work after an event of ``record``, ``mark`` or ``open_mark``."""
        ...

    def side(self) -> "Gpu":
        """Return the same GPU with a stream of its own, beside that of ``use``."""
        ...

    # -- memory ------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Any:
        """Return memory of its own allocation, filled with zeros; it has an address as ``ptr``."""
        ...

    def array(self, address: int, nbytes: int, owner: object) -> Array:
        """Return memory as an array of bytes, which keeps ``owner`` alive."""
        ...

    def dense(self, array: Array) -> Array:
        """Return a copy of an array of this or another library that is contiguous."""
        ...

    def duplicate(self, array: Array) -> Array:
        """Return a copy of an array, in memory of its own."""
        ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy between addresses, each on a GPU or the host."""
        ...

    def zero(self, array: Array) -> None:
        """Fill an array of this or another library with zeros."""
        ...

    def pinned(self, nbytes: int) -> Array:
        """Return host memory that the GPU addresses, as bytes."""
        ...

    def register(self, address: int, nbytes: int) -> None:
        """Pin host memory, so that the GPU addresses it."""
        ...

    def unregister(self, address: int) -> None:
        """Undo ``register``."""
        ...

    # -- between processes -------------------------------------------------------------------------

    def export(self, memory: Any) -> bytes:
        """Return the handle by which other processes open memory of ``allocate``."""
        ...

    def open(self, handle: bytes) -> int:
        """Return where the memory of another process is in this one."""
        ...

    def close(self, address: int) -> None:
        """Close what ``open`` returned."""
        ...

    def mark(self) -> tuple[Any, bytes]:
        """Return an event to be recorded again and again, and its handle for other processes."""
        ...

    def record_mark(self, mark: Any) -> None:
        """Record an event of ``mark`` behind all work so far."""
        ...

    def open_mark(self, handle: bytes) -> Any:
        """Return the event of another process."""
        ...

    # -- compute -----------------------------------------------------------------------------------

    def make_kernel(self, node_size: int, *, is_staged: bool) -> Kernel:
        """Return the kernel for the ranks of a node; see ``CudaKernel``."""
        ...
