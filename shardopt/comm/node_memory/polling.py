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


@compiled(types.int64(_FLAGS, types.int64, types.int64, types.int64))
def last_of_all(flags: NDArray[np.int64], ended: int, total: int, segment: int) -> int:
    """Return the last position of any rank once all have ended the segment, or -1.

    Args:
        flags: As for ``announced_by_all``, as are the others.
        ended: Likewise.
        total: Likewise.
        segment: Likewise.
    """
    fence()  # type: ignore[call-arg]
    for rank in range(flags.shape[0]):
        if flags[rank, ended] != segment:
            return -1
    fence()
    last = 0
    for rank in range(flags.shape[0]):
        last = max(last, int(flags[rank, total]))
    return last


@compiled(types.int64(_FLAGS, _ENDS, types.int64, types.int64, types.int64, types.int64))
def count_equal(
    flags: NDArray[np.int64],
    ends: NDArray[np.int64],
    position: int,
    field: int,
    mask: int,
    value: int,
) -> int:
    """Return how many ranks have announced a position, with a value in some bits of a field.

    Args:
        flags: As for ``announced_by_all``.
        ends: As that leaves it.
        position: The position.
        field: The field.
        mask: The bits.
        value: The value.
    """
    found = 0
    for rank in range(flags.shape[0]):
        if position < ends[rank] and flags[rank, field] & mask == value:
            found += 1
    return found
