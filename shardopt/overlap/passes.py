"""The backwards that the ranks of a node have run, and where their gradients end in a ring."""

import numpy as np
from numpy.typing import NDArray

from shardopt.comm.flags import NodeFlags
from shardopt.store.memory import Memory

_COUNT, _END, _NUM_FIELDS = 0, 1, 3  # two ends, by the parity of the count
_MOST = 1 << 32  # of a segment


class Passes:
    """Counts the backwards of each rank in a segment; see [Note: gradients averaged in backward].

    Collective over the node: construction.

    Args:
        memory: Of the node.
    """

    def __init__(self, memory: Memory) -> None:
        self._flags = NodeFlags(memory.arena, _NUM_FIELDS)
        self._segment = self._num = 0

    def begin(self, segment: int) -> None:
        """Count from zero."""
        self._segment, self._num = segment, 0

    def add(self, end: int) -> None:
        """Note that this rank has run one more.

        Args:
            end: The position behind its gradients.
        """
        self._num += 1
        self._flags.mine[_END + self._num % 2] = end
        self._flags.publish()
        self._flags.mine[_COUNT] = self._count
        self._flags.publish()

    def are_late(self) -> NDArray[np.bool_]:
        """Return for each rank whether it has run fewer in this segment than this one, so far."""
        self._flags.acquire()
        counts = self._flags.all[:, _COUNT]
        return counts < self._count if self._num else np.zeros(len(counts), np.bool_)

    def end(self) -> int:
        """Return the last end of those ranks that have run as many as this one.

        Others that have run more have not looked at averages here: where these ended is not known.
        """
        if not self._num:
            return 0
        self._flags.acquire()
        ends = self._flags.all[:, _END + self._num % 2].copy()
        self._flags.acquire()  # the counts show that the ends belong to them
        return int(ends[self._flags.all[:, _COUNT] == self._count].max(initial=0))

    @property
    def _count(self) -> int:
        """The count as others see it: it grows from segment to segment."""
        return self._segment * _MOST + self._num
