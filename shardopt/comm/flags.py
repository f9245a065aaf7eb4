"""A board of flags: a few integers of each rank of a node that the others can read."""

import numpy as np

from shardopt.comm.node_memory.arena import Arena
from shardopt.comm.node_memory.fence import full_fence

_LINE_NUMEL = 8  # int64 in a cache line, so that no two ranks write to the same one


class NodeFlags:
    """Integers that each rank of a node sets for the others, all zero at first.

    A rank writes to ``mine`` and calls ``publish``; another calls ``acquire`` and reads ``all``.
    Nobody waits for anybody, so this also works while ranks hang or have died. Data that a flag
    announces must be published before the flag is set: [Note: when stores become visible].

    Collective over the node: construction.

    Args:
        arena: The memory of the node.
        num_fields: Integers of each rank.

    Attributes:
        mine: [num_fields] int64, this rank's to write.
        all: [node_size, num_fields] int64, those of all ranks.
    """

    def __init__(self, arena: Arena, num_fields: int) -> None:
        line_numel = -(-num_fields // _LINE_NUMEL) * _LINE_NUMEL
        shape = arena.comm.size, line_numel
        memory = arena.allocate(np.dtype(np.int64).itemsize * shape[0] * shape[1]).memory
        lines = memory.view(np.int64)[: shape[0] * shape[1]].reshape(shape)
        self._lines = lines
        self.all = lines[:, :num_fields]
        self.mine = self.all[arena.comm.rank]

    def publish(self) -> None:
        """Show the others what this rank has written to ``mine``."""
        full_fence()

    def snapshot(self) -> bytes:
        """Return what all flags are by now, to be compared with another look, without a fence."""
        return self._lines.tobytes()

    def acquire(self) -> None:
        """See in ``all`` what the others have published by now."""
        full_fence()
