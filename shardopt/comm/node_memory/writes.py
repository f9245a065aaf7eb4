"""Three ways to find the pages of a private mapping that this process has written.

[Note: protect, then drop]
A page is protected while it still holds what was written, and dropped afterwards. A write that
comes between the two is dropped as well, but has lifted the protection, so that the next write is
reported. The other way round, such a write would leave a protected copy that no scan reports, and
the process would read it for ever.
"""

import functools
import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import IntArray
from shardopt.comm.node_memory.linux import PAGE_NBYTES, PageMap, WriteProtection, WriteScan
from shardopt.comm.node_memory.probing import why_no_pagemap, why_no_userfaultfd
from shardopt.errors import HyperparamsError

VARIABLE = "SHARDOPT_WRITE_TRACKING"

# Why each way cannot work here, the best way first.
_OBSTACLES: dict[str, Callable[[], str | None]] = {
    "userfaultfd": why_no_userfaultfd,
    "pagemap": why_no_pagemap,
    "compare": lambda: None,
}

_NOTHING: IntArray = np.empty((0, 2), np.int64)


class WriteTracking(Protocol):
    """A way to find the written pages of private mappings.

    A forked child must not call it.

    Attributes:
        name: How it is called in the environment variable and in reports.
        sees_writes: Whether what it reports has been written for sure.
        protects: Whether ``written`` protects what it reports, so that the next write faults.
    """

    name: str
    sees_writes: bool
    protects: bool

    def track(self, address: int, nbytes: int) -> None:
        """Begin to track whole pages of a private mapping that have not been written yet."""

    def written(self, address: int, nbytes: int) -> IntArray:
        """Return the pages of a tracked range that may have been written since the last call.

        Pages that have not been dropped since may be reported again.

        Returns:
            [n, 2] runs of pages as bytes [start, stop) from ``address``: sorted, never touching.
        """

    def protect(self, address: int, nbytes: int) -> None:
        """Have later writes to a tracked range reported: [Note: protect, then drop]."""


class UserfaultfdTracking:
    """Write protection, which the kernel lifts at the first write; pages are reported once."""

    name = "userfaultfd"
    sees_writes = True
    protects = True

    def __init__(self) -> None:
        self._protection, self._scan = WriteProtection(), WriteScan()
        self.track, self.protect = self._protection.register, self._protection.protect

    def written(self, address: int, nbytes: int) -> IntArray:
        """Return the written pages, which are protected again in the same call."""
        parts = self._scan.take(address, nbytes)
        return _join(np.concatenate(parts) - address) if parts else _NOTHING


class PagemapTracking:
    """The kernel's record of which pages are this process's own: written and not dropped."""

    name = "pagemap"
    sees_writes = True
    protects = False

    def __init__(self) -> None:
        self._pagemap = PageMap()

    def track(self, address: int, nbytes: int) -> None:
        """Do nothing: the kernel records this for all memory."""

    def written(self, address: int, nbytes: int) -> IntArray:
        """Return the pages that are this process's own."""
        return runs_of(self._pagemap.private_pages(address, nbytes)) * PAGE_NBYTES

    def protect(self, address: int, nbytes: int) -> None:
        """Do nothing, as in ``track``."""


class CompareTracking:
    """No tracking: any page may have been written, and only comparing shows which were."""

    name = "compare"
    sees_writes = False
    protects = False

    def track(self, address: int, nbytes: int) -> None:
        """Do nothing."""

    def written(self, address: int, nbytes: int) -> IntArray:
        """Return the whole range."""
        return np.array([[0, nbytes]], np.int64)

    def protect(self, address: int, nbytes: int) -> None:
        """Do nothing."""


def write_tracking() -> WriteTracking:
    """Return this process's way to track writes: the best that works, or the one asked for.

    Raises:
        HyperparamsError: The environment variable asks for one that does not exist or work here.
    """
    return _tracking_of(os.getpid())  # a forked child must not use its parent's


@functools.lru_cache(maxsize=1)
def _tracking_of(pid: int) -> WriteTracking:
    forced = os.environ.get(VARIABLE, "")
    if forced and forced not in _OBSTACLES:
        choices = ", ".join(_OBSTACLES)
        raise HyperparamsError(
            f"{VARIABLE} must be one of {choices}; got {forced!r}. Unset it to use the best of "
            "them that works here."
        )
    if forced and (reason := _OBSTACLES[forced]()):
        raise HyperparamsError(
            f"{VARIABLE} must name a way that works here; got {forced!r}. {reason} Unset it to "
            "use the best way that works."
        )
    name = forced or next(name for name, obstacle in _OBSTACLES.items() if not obstacle())
    if name == "userfaultfd":
        return UserfaultfdTracking()
    return PagemapTracking() if name == "pagemap" else CompareTracking()


def runs_of(flags: NDArray[np.bool_]) -> IntArray:
    """Return where the runs of set flags begin and end, [n, 2]."""
    edges = np.flatnonzero(flags[1:] != flags[:-1]) + 1
    first = [0] if flags[0] else []
    last = [flags.size] if flags[-1] else []
    return np.concatenate([first, edges, last]).astype(np.int64).reshape(-1, 2)


def _join(runs: IntArray) -> IntArray:
    """Join sorted runs [n, 2] that touch each other."""
    apart = runs[1:, 0] != runs[:-1, 1]
    starts = runs[np.concatenate([[True], apart]), 0]
    return np.stack([starts, runs[np.concatenate([apart, [True]]), 1]], axis=1)
