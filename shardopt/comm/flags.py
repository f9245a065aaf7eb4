"""A board of flags: a few integers of each rank of a node that the others can read."""

import numpy as np
from mpi4py import MPI

from shardopt.comm.shared_memory import SharedMemory

_LINE_NUMEL = 8  # int64 in a cache line, so that no two ranks write to the same one


class NodeFlags:
    """Integers that each rank of a node sets for the others, all zero at first.

    A rank writes to ``mine`` and calls ``publish``; another calls ``acquire`` and reads ``all``.
    Nobody waits for anybody, so this also works while ranks hang or have died. Data that a flag
    announces must be published before the flag is set: [Note: when stores become visible].

    Collective over the node: construction and ``free``.

    Args:
        node_comm: The ranks of the node.
        num_fields: Integers of each rank.

    Attributes:
        mine: [num_fields] int64, this rank's to write.
        all: [node_size, num_fields] int64, those of all ranks.
    """

    def __init__(self, node_comm: MPI.Intracomm, num_fields: int) -> None:
        line_numel = -(-num_fields // _LINE_NUMEL) * _LINE_NUMEL
        self._memory = SharedMemory(node_comm, np.dtype(np.int64).itemsize * line_numel)
        lines = self._memory.memory.view(np.int64).reshape(node_comm.size, line_numel)
        self.all = lines[:, :num_fields]
        self.mine = self.all[node_comm.rank]
        self.mine[:] = 0
        self.publish()
        node_comm.Barrier()
        self.acquire()

    def publish(self) -> None:
        """Show the others what this rank has written to ``mine``."""
        self._memory.publish()

    def acquire(self) -> None:
        """See in ``all`` what the others have published by now."""
        self._memory.acquire()

    def free(self) -> None:
        """Release the memory. Collective over the node."""
        del self.all, self.mine
        self._memory.free()
