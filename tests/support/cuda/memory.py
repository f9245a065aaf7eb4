"""Memory of a device that does not exist: accesses that it would not allow are errors."""

import numpy as np

from shardopt.layout.padding import round_up

RED_ZONE_NBYTES = 256
"""Between allocations, and what they are aligned to."""


class AccessError(Exception):
    """A thread has reached where it must not, or two have met there."""


class Memory:
    """Allocations with red zones between them.

    Args:
        room: [nbytes] uint8 that begins on a multiple of ``RED_ZONE_NBYTES``; None allocates it.
        start: Where in it the allocations begin.

    Attributes:
        room: As given.
        base: Its address.
        runs: First byte and end of each allocation, counted from the start of ``room``.
        accesses: For each allocation that was accessed, the operations and their numbers of bytes.
    """

    def __init__(self, room=None, start=0):
        if room is None:
            raw = np.zeros((1 << 26) + RED_ZONE_NBYTES, np.uint8)  # untouched, it takes none
            room = raw[-raw.ctypes.data % RED_ZONE_NBYTES :]
        self.room, self.base = room, room.ctypes.data
        self.runs = []
        self.accesses = {}
        self._start = start

    def array(self, values):
        """Return a copy of an array that is in this memory until it is freed."""
        start = self._start + RED_ZONE_NBYTES
        for first, last in self.runs:
            if start + values.nbytes + RED_ZONE_NBYTES <= first:
                break
            start = max(start, round_up(last, RED_ZONE_NBYTES) + RED_ZONE_NBYTES)
        stop = start + values.nbytes
        assert stop + RED_ZONE_NBYTES <= self.room.size, "the memory is full"
        self.add_runs([(start, stop)])
        copy = self.room[start:stop].view(values.dtype).reshape(values.shape)
        copy[...] = values
        return copy

    def free(self, array):
        """Forbid accesses to an array from now on."""
        start = array.ctypes.data - self.base
        self.runs.remove((start, start + array.nbytes))
        self.accesses.pop(start, None)

    def add_runs(self, runs):
        """Allow accesses to allocations that others have made."""
        self.runs = sorted({*self.runs, *runs})

    def offsets(self, addresses, nbytes, op):
        """Return where in ``room`` accesses of so many bytes begin.

        Raises:
            AccessError: One is not aligned, or out of bounds.
        """
        offsets = addresses.astype(np.int64) - self.base
        if (offsets % nbytes).any():
            raise AccessError(f"an access of {nbytes} bytes is not aligned")
        starts, stops = np.array(self.runs, np.int64).T
        found = np.searchsorted(starts, offsets, "right") - 1
        if (found < 0).any() or (offsets + nbytes > stops[found]).any():
            raise AccessError(f"an access of {nbytes} bytes is out of bounds")
        for index in np.unique(found).tolist():
            self.accesses.setdefault(self.runs[index][0], set()).add((op, nbytes))
        return offsets

    def accesses_of(self, array):
        """Return the operations on an array, with the number of bytes that each takes at once."""
        return self.accesses.get(array.ctypes.data - self.base, set())
