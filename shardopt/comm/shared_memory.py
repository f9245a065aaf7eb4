"""Memory that all ranks of a node address.

[Note: when stores become visible]
What one rank stores may be read by another only after three things in this order: the writer's
``publish()``, a collective that the writer has entered and the reader has left, and the reader's
``acquire()``. ``step()`` goes through them twice: on its way in, after which gradients and replaced
parameters can be read, and on its way out, after which updated parameters can be read and gradients
may be overwritten. In between, every element has one writer: parameters and summed gradients are
written by the owner of their shard.

Gradients that leave while backward runs become readable by a flag in place of the collective: the
writer's ``publish()``, its store to a flag of ``NodeFlags``, the reader's load of that flag, the
reader's ``acquire()``; see [Note: gradients sent during backward].
"""

import ctypes
import mmap
import os
import weakref

import numpy as np
from mpi4py import MPI

from shardopt.errors import SharedMemoryError

SHARED_MEMORY_FOLDER = "/dev/shm"  # where both MPIs put it on Linux


class SharedMemory:
    """Memory to which each rank of a node contributes a part; the parts follow in rank order.

    It is an allocation of ``MPI.Win.Allocate_shared``, which stays in one passive epoch
    (``Lock_all``) until it is released.

    Collective over the node: construction and ``free``.

    Args:
        node_comm: The ranks that share the memory.
        nbytes: The part of this rank.

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

    def publish(self) -> None:
        """Order this rank's stores before what follows: [Note: when stores become visible]."""
        self._win.Sync()

    def acquire(self) -> None:
        """Order this rank's loads after what came before: [Note: when stores become visible]."""
        self._win.Sync()

    def free(self) -> None:
        """Unmap the memory, unless some rank still holds a view of it. Collective.

        A view that outlives the mapping would read other memory or crash the process. What is
        still held is therefore left to the end of the process.
        """
        memory = weakref.ref(self.memory)
        del self.memory
        if not self._comm.allreduce(memory() is not None, op=MPI.LOR):
            self._win.Unlock_all()
            self._win.Free()


def free_shared_nbytes() -> int:
    """Return the bytes of shared memory that are free on this node."""
    status = os.statvfs(SHARED_MEMORY_FOLDER)
    return status.f_bavail * status.f_frsize


def shortage(needed_nbytes: int) -> SharedMemoryError | None:
    """Return an error if so many bytes do not fit the node: writing to them would end in SIGBUS."""
    free_nbytes = free_shared_nbytes()
    if needed_nbytes <= free_nbytes:
        return None
    return SharedMemoryError(
        f"{SHARED_MEMORY_FOLDER} must have {needed_nbytes:,} bytes free for the parameters and "
        f"gradients of this node; got {free_nbytes:,} bytes. Enlarge it (mount -o "
        "remount,size=..., or docker run --shm-size=...), or start fewer ranks on the node."
    )
