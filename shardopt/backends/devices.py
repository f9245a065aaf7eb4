"""The devices that a rank can compute on, by name."""

import sys

from shardopt.backends.base import Device
from shardopt.comm.node_memory.arena import Arena

HOST = "cpu"


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


def number_of(name: str) -> int:
    """Return the number of a device among those that this process sees."""
    return int(name.partition(":")[2])
