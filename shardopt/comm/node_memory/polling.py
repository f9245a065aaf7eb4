"""Looks at the flags of a ring, compiled: backward polls them in its hooks."""

import numpy as np
from numba import types
from numpy.typing import NDArray

from shardopt.comm.node_memory.fence import fence
from shardopt.compiling import compiled

_FLAGS = types.Array(types.int64, 2, "A")
_FAR = 1 << 62
_ENDS = types.Array(types.int64, 1, "C")


@compiled(types.int64(_FLAGS, types.int64))
def least(flags: NDArray[np.int64], field: int) -> int:
    """Return the least that the ranks of a node have published in a field by now."""
    fence()  # type: ignore[call-arg]  # Numba adds the context
    found: int = flags[0, field]
    for rank in range(1, flags.shape[0]):
        found = min(found, flags[rank, field])
    return found


@compiled(types.int64(_FLAGS, types.int64, types.int64, types.int64, types.int64, _ENDS))
def announced_by_all(
    flags: NDArray[np.int64],
    announced: int,
    ended: int,
    total: int,
    segment: int,
    ends: NDArray[np.int64],
) -> int:
    """Return the position up to which each rank has announced its gradients, or has none.

    A rank that has ended the segment has announced zeros for all that follows; once all have, the
    last position of any of them counts.

    Args:
        flags: [node_size, fields] of all ranks.
        announced: The field with the position that a rank has announced.
        ended: The field with the segment that it has ended.
        total: The field with the position where it has.
        segment: The present one.
        ends: [node_size] is set to the position of each rank up to which its buffers are filled.
    """
    num_ended, most, lowest = 0, 0, _FAR
    for rank in range(flags.shape[0]):
        while True:  # until what it has announced is known to be of this segment
            before = flags[rank, ended] == segment
            fence()  # type: ignore[call-arg]
            position = int(flags[rank, announced])
            fence()
            if (flags[rank, ended] == segment) == before:
                break
        if before:
            position = int(flags[rank, total])
            num_ended += 1
        else:
            lowest = min(lowest, position)
        ends[rank] = position
        most = max(most, position)
    return most if num_ended == flags.shape[0] else lowest
