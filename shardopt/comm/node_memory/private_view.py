"""A rank's own view of node memory: shared until it is written to, and shared again afterwards."""

import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import IntArray
from shardopt.comm.node_memory.comparing import changed
from shardopt.comm.node_memory.linux import PAGE_NBYTES, drop_pages
from shardopt.comm.node_memory.writes import WriteTracking, runs_of
from shardopt.layout.span import Span

_EQUAL_ROUNDS = 8  # after which a kept page is given back


class PrivateView:
    """This rank's own view of a range of node memory.

    A page of the view shows the shared memory until this rank writes to it, which makes a copy.
    A round is ``find_writes``, or several of them, and then ``refresh``, after which all pages show
    the shared memory again. Most written pages are dropped then. Pages that were written in two
    rounds in a row are *kept*, since a copy costs less than the faults of dropping and writing
    again: they stay this rank's, nobody tracks them, and ``refresh`` copies the shared memory into
    them. Those that nobody writes to for some rounds are given back.

    What is written between ``find_writes`` and ``refresh`` is lost in pages that ``find_writes``
    returned and in kept ones; in all others the next ``find_writes`` finds it. The shared memory
    may change in between only: kept pages, which are compared with it, would look written.

    Every method does nothing in a forked child, whose view is a copy of its parent's.

    Args:
        shared: [n] whole pages of node memory.
        view: [n] the same pages, mapped privately, and not written yet.
        tracking: Finds written pages; it begins to track the view here.
        budget: Returns how many bytes of this view may be kept at most.

    Attributes:
        shared: As given.
        view: As given.
    """

    def __init__(
        self,
        shared: NDArray[np.uint8],
        view: NDArray[np.uint8],
        tracking: WriteTracking,
        budget: Callable[[], int],
    ) -> None:
        assert shared.size == view.size > 0
        self.shared, self.view = shared, view
        self._tracking, self._budget = tracking, budget
        self._address, self._pid = view.ctypes.data, os.getpid()
        num_pages = view.size // PAGE_NBYTES
        # In one piece, which is large enough to take no memory before a write has been found.
        flags = np.zeros((5, num_pages), np.bool_)
        self._written: NDArray[np.bool_] = flags[0]  # in this round, and not kept
        self._written_before: NDArray[np.bool_] = flags[1]  # in the round before
        self._kept: NDArray[np.bool_] = flags[2]
        self._differs: NDArray[np.bool_] = flags[3]  # kept, and found to differ in this round
        self._equal_rounds = flags[4].view(np.uint8)  # of kept ones
        self._tracked = [Span(0, view.size)]  # where to look for writes
        self._has_kept = self._found_any = self._found_before = False
        tracking.track(self._address, view.size)

    @property
    def kept_nbytes(self) -> int:
        """Bytes of the view that are kept."""
        return int(np.count_nonzero(self._kept)) * PAGE_NBYTES if self._has_kept else 0

    def find_writes(self) -> list[Span]:
        """Return the bytes of the view that may differ from the shared memory, as whole pages.

        These are the pages written since the last call, those that earlier calls returned and
        that have not been refreshed, and the kept ones that do differ.
        """
        if os.getpid() != self._pid:
            return []
        for tracked in self._tracked:
            self._scan(tracked)
        if self._has_kept:
            self._written &= ~self._kept
            pages = np.flatnonzero(self._kept)
            bounds = np.stack([pages, pages + 1], axis=1) * PAGE_NBYTES
            self._differs[pages] |= changed(self.view, self.shared, bounds)
        elif not self._found_any:
            return []
        return _spans(self._written | self._differs)

    @property
    def copies_shared(self) -> bool:
        """Whether ``refresh`` may copy shared memory, which must be complete then."""
        return self._found_any or self._found_before or self._has_kept

    def find_written(self, within: Span) -> list[Span]:
        """Return where the view differs from the shared memory in a part of it, as whole pages.

        Args:
            within: Whole pages, none of which is kept.
        """
        if os.getpid() != self._pid:
            return []
        for tracked in self._tracked:
            if part := tracked.intersect(within):
                self._scan(part)
        first = within.start // PAGE_NBYTES
        runs = runs_of(self._written[first : within.stop // PAGE_NBYTES]) + first
        differ = runs[changed(self.view, self.shared, runs * PAGE_NBYTES)]
        return [Span(start, stop) for start, stop in (differ * PAGE_NBYTES).tolist()]

    def undo(self, written: Sequence[Span]) -> None:
        """Show the shared memory again in what ``find_written`` has returned."""
        for span in written:
            self._tracking.protect(self._address + span.start, span.numel)
            if not drop_pages(self._address + span.start, span.numel):
                self._copy(span)
            self._written[span.start // PAGE_NBYTES : span.stop // PAGE_NBYTES] = False

    def refresh(self) -> None:
        """Make the view show the shared memory again wherever ``find_writes`` found writes."""
        if os.getpid() != self._pid or not self.copies_shared:
            return
        newly_kept = self._choose_kept()
        self._equal_rounds += self._kept
        self._equal_rounds[self._differs | newly_kept] = 0
        given_back = self._kept & (self._equal_rounds >= _EQUAL_ROUNDS)
        self._kept = (self._kept | newly_kept) & ~given_back
        for span in _spans(given_back):  # [Note: protect, then drop]; the others are protected
            self._tracking.protect(self._address + span.start, span.numel)
        for span in _spans(self._written & ~newly_kept | given_back):
            if not drop_pages(self._address + span.start, span.numel):
                self._copy(span)
        for span in _spans(self._kept):
            self._copy(span)
        self._begin_round(has_new_gaps=bool(newly_kept.any() or given_back.any()))

    def _scan(self, span: Span) -> None:
        """Note which pages of a tracked span have been written since the last look."""
        written = self._tracking.written(self._address + span.start, span.numel)
        if len(written):
            self._found_any = True
            _set(self._written, (written + span.start) // PAGE_NBYTES)

    def _choose_kept(self) -> NDArray[np.bool_]:
        """Return the pages to keep from now on: written twice in a row, as many as may be."""
        chosen = self._written & self._written_before
        if not self._tracking.sees_writes or not chosen.any():
            return np.zeros_like(chosen)
        room = max(0, self._budget() - self.kept_nbytes) // PAGE_NBYTES
        chosen[np.flatnonzero(chosen)[room:]] = False
        return chosen

    def _copy(self, span: Span) -> None:
        self.view[span.slice] = self.shared[span.slice]

    def _begin_round(self, has_new_gaps: bool) -> None:
        self._written, self._written_before = self._written_before, self._written
        self._written[:] = False
        self._differs[:] = False
        self._found_any, self._found_before = False, self._found_any
        if has_new_gaps:
            self._has_kept = bool(self._kept.any())
            # A scan that protected kept pages again would make each write to them fault; where
            # nothing is protected, one look at the whole is faster than many at what is between.
            if self._tracking.protects:
                self._tracked = _spans(~self._kept)


def _set(flags: NDArray[np.bool_], runs: IntArray) -> None:
    """Set the flags of runs [n, 2]."""
    for start, stop in runs.tolist():
        flags[start:stop] = True


def _spans(pages: NDArray[np.bool_]) -> list[Span]:
    """Return the runs of set flags, in bytes."""
    return [Span(start, stop) for start, stop in (runs_of(pages) * PAGE_NBYTES).tolist()]
