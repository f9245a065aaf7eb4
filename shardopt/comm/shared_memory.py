"""Memory that all ranks of a node address.

[Note: when stores become visible]
A window stays in one passive epoch (``Lock_all``) from allocation to release. A rank's stores
may be read by another only after: the writer's ``sync()``, a collective that the writer has
entered and the reader has left, the reader's ``sync()``. ``step()`` does so twice: on its way in
(gradients and replaced parameters become readable) and on its way out (updated parameters do,
and gradients may be overwritten). Between the two, every element of a window has one writer:
parameters and summed gradients the owner of their shard.

Gradients that leave while backward runs become readable by a flag in the place of the collective:
the writer's ``sync()``, its store to a flag in a window, the reader's load of that, the reader's
``sync()``; see [Note: early travellers].
"""

import ctypes
import mmap
import os
import weakref

import numpy as np
from mpi4py import MPI

from shardopt.errors import SharedMemoryError

SHARED_MEMORY_FOLDER = "/dev/shm"  # where both MPIs put windows on Linux


class Window:
    """One allocation of ``MPI.Win.Allocate_shared``; ranks' parts follow each other in rank order.

    Collective over the node: construction and ``free``.

    Args:
        node_comm: The ranks that share the window.
        nbytes: What this rank contributes.

    Attributes:
        memory: [sum of all ranks' nbytes] uint8, beginning on a page.
    """

    def __init__(self, node_comm: MPI.Intracomm, nbytes: int) -> None:
        self._comm = node_comm
        total_nbytes = node_comm.allreduce(nbytes)
        slack = mmap.PAGESIZE if node_comm.rank == 0 else 0
        self._win = MPI.Win.Allocate_shared(nbytes + slack, comm=node_comm)
        self._win.Lock_all(MPI.MODE_NOCHECK)
        address = self._win.Shared_query(0)[0].address
        address += node_comm.bcast(-address % mmap.PAGESIZE)  # addresses differ by whole pages only
        buffer = (ctypes.c_byte * total_nbytes).from_address(address)
        self.memory = np.frombuffer(buffer, np.uint8)

    def sync(self) -> None:
        """Order this rank's loads and stores: see [Note: when stores become visible]."""
        self._win.Sync()

    def free(self) -> None:
        """Unmap the memory, unless some rank still holds a view of it. Collective.

        A view that outlives the window would read another's memory or crash the process; the few
        windows held so are left to the end of the process.
        """
        memory = weakref.ref(self.memory)
        del self.memory
        if not self._comm.allreduce(memory() is not None, op=MPI.LOR):
            self._win.Unlock_all()
            self._win.Free()


def free_shared_nbytes() -> int:
    """Bytes of shared memory that this node can still hand out."""
    status = os.statvfs(SHARED_MEMORY_FOLDER)
    return status.f_bavail * status.f_frsize


def shortage(needed_nbytes: int) -> SharedMemoryError | None:
    """Say whether windows of so many bytes fit the node; a later write would die of SIGBUS."""
    free_nbytes = free_shared_nbytes()
    if needed_nbytes <= free_nbytes:
        return None
    return SharedMemoryError(
        f"{SHARED_MEMORY_FOLDER} must have {needed_nbytes:,} bytes free for the parameters and "
        f"gradients of this node; got {free_nbytes:,} bytes. Enlarge it (mount -o "
        "remount,size=..., or docker run --shm-size=...), or start fewer ranks on the node."
    )
