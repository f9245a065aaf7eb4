"""The devices that a rank can compute on, by name."""

import os
import sys

from shardopt.backends.base import Device
from shardopt.comm.node_memory.arena import Arena
from shardopt.trace import Annotate

HOST = "cpu"

_NVTX_LISTENER = "NVTX_INJECTION64_PATH"  # NVIDIA's profilers set it for what they start


def make_device(name: str, arena: Arena) -> Device:
    """Return a device as the backend of this rank.

    Collective over the node.

    Args:
        name: As an adapter names it, such as ``cuda:0``.
        arena: The memory of the node.

    Raises:
        KernelError: Some rank of the node cannot use its device; on every rank.
    """
    from shardopt.backends.cuda.backend import make_backend  # CuPy, which few need

    return make_backend(number_of(name), arena)


def current_queue(name: str) -> int:
    """Return CuPy's current stream on a device; 0, the default one, where CuPy is not in use.

    Args:
        name: As an adapter names it.
    """
    if name == HOST or "cupy" not in sys.modules:
        return 0
    from shardopt.backends.cuda.cupy_gpu import current_stream

    return current_stream(number_of(name))


def make_annotate(name: str | None, *, wanted: bool) -> Annotate | None:
    """Return what shows spans to the profilers of a device.

    Args:
        name: As an adapter names it; None if there is none.
        wanted: Whether to do so even if this process has not been started by one.
    """
    if name in (None, HOST) or not (wanted or _NVTX_LISTENER in os.environ):
        return None
    from shardopt.backends.cuda.nvtx import make_annotate

    return make_annotate()


def number_of(name: str) -> int:
    """Return the number of a device among those that this process sees."""
    return int(name.partition(":")[2])
