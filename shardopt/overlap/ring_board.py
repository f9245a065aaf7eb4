"""The board on which the ranks of a node note how far each is in the ring."""

import numpy as np
from numpy.typing import NDArray

from shardopt.comm.flags import NodeFlags
from shardopt.comm.node_memory.polling import announced_by_all, count_equal, last_of_all, least
from shardopt.store.memory import Memory

# Fields of the flags. The ends of two segments in a row are kept apart, by the segment's parity.
_ANNOUNCED, _SUMMED, _CLOSED, _ENDED, _TOTAL, _END_CONTENTS, _CONTENTS = 0, 1, 2, 4, 6, 8, 10

HAS_MORE = 1
"""A bit in the contents of a segment's end: the rank has gradients for another segment."""

_NOT_YET = -1  # of ``last_of_all``
_NUM_BITS = 2  # of the contents of a position; those above are the number of a buffer
_BITS = (1 << _NUM_BITS) - 1


class RingBoard:
    """How far each rank of a node is in a ring, and where it ends a segment; see ``GradRing``.

    Backward looks at it in its hooks, and waits look over and over: looks are compiled, and whoever
    finds the same ``snapshot`` as before needs no other.

    Collective over the node: construction.

    Args:
        memory: Of the node.
        depth: Buffers of a rank.

    Attributes:
        segment: The present one.
    """

    def __init__(self, memory: Memory, depth: int) -> None:
        self.segment = 1
        self._flags, self._depth = NodeFlags(memory.arena, _CONTENTS + depth), depth
        self._all, self._mine = self._flags.all, self._flags.mine
        self._ends = np.zeros(len(self._all), np.int64)  # up to where each rank has announced
        self._agreed: tuple[int, bool] | None = None

    def snapshot(self) -> bytes:
        """Return what all ranks, this one included, have told by now, to be compared."""
        return self._flags.snapshot()

    # -- positions ---------------------------------------------------------------------------------

    def announce(self, position: int) -> None:
        """Announce the buffers of all positions before this one, which are published."""
        self._mine[_ANNOUNCED] = position
        self._flags.publish()

    def set_contents(self, position: int, contents: int, slot: int) -> None:
        """Note what the others must know of a position that is about to be announced.

        Args:
            position: The position.
            contents: Below 4.
            slot: The number of the buffer that has its gradients, if there are any.
        """
        self._mine[_CONTENTS + position % self._depth] = contents | slot << _NUM_BITS

    def set_summed(self, position: int) -> None:
        """Note that this rank needs no buffer of a position before this one any more."""
        self._mine[_SUMMED] = position
        self._flags.publish()

    def least_summed(self) -> int:
        """Return the position up to which no rank needs a buffer any more."""
        return least(self._all, _SUMMED)

    def ready(self) -> int:
        """Return the position up to which each rank has announced gradients, or has none."""
        agreed = None if self._agreed is None else self.total()  # before the look: all had ended
        parity = self.segment % 2
        fields = _ANNOUNCED, _ENDED + parity, _TOTAL + parity
        ready = announced_by_all(self._all, *fields, self.segment, self._ends)
        return ready if agreed is None else agreed

    def count(self, position: int, contents: int) -> int:
        """Return how many ranks have announced a position with just these contents.

        Args:
            position: One before the last ``ready``, as for all that follow.
            contents: As noted by ``set_contents``.
        """
        field = _CONTENTS + position % self._depth
        return count_equal(self._all, self._ends, position, field, _BITS, contents)

    def contents(self, position: int) -> NDArray[np.int64]:
        """Return the contents of a position on each rank; only announced ones mean anything."""
        contents: NDArray[np.int64] = self._all[:, _CONTENTS + position % self._depth] & _BITS
        return contents

    def slots(self, position: int) -> tuple[int, ...]:
        """Return the buffer of each rank that has its gradients of a position, if it has any."""
        return tuple((self._all[:, _CONTENTS + position % self._depth] >> _NUM_BITS).tolist())

    def are_announced(self, position: int) -> NDArray[np.bool_]:
        """Return for each rank whether it has announced a position; else it has nothing there."""
        announced: NDArray[np.bool_] = self._ends > position
        return announced

    def are_behind(self, position: int) -> NDArray[np.bool_]:
        """Return for each rank whether it may need a buffer before a position."""
        self._flags.acquire()
        behind: NDArray[np.bool_] = self._all[:, _SUMMED] < position
        return behind

    # -- segments ----------------------------------------------------------------------------------

    def close(self, total: int, contents: int) -> None:
        """Note where this rank ends the segment, and what the others must know of its end."""
        parity = self.segment % 2
        self._mine[_TOTAL + parity], self._mine[_END_CONTENTS + parity] = total, contents
        self._flags.publish()
        self._mine[_CLOSED + parity] = self.segment
        self._flags.publish()

    def end(self) -> None:
        """Note that this rank has announced all that it has in the segment."""
        parity = self.segment % 2
        if self._mine[_ENDED + parity] != self.segment:
            self._mine[_ENDED + parity] = self.segment
            self._flags.publish()

    def my_end(self) -> tuple[int, int]:
        """Return what this rank has given to ``close``."""
        parity = self.segment % 2
        return int(self._mine[_TOTAL + parity]), int(self._mine[_END_CONTENTS + parity])

    def agree(self, total: int, *, has_more: bool) -> None:
        """Have the segment end elsewhere; see ``GradRing.extend_to``."""
        self._agreed = total, has_more

    def total(self) -> int | None:
        """Return the last position of all ranks once all have ended the segment, or None."""
        parity = self.segment % 2
        last = last_of_all(self._all, _ENDED + parity, _TOTAL + parity, self.segment)
        if last == _NOT_YET:
            return None
        return last if self._agreed is None else self._agreed[0]

    def has_more(self) -> bool:
        """Whether some rank has something for another segment, once all have ended this one."""
        if self._agreed is not None:
            return self._agreed[1]
        return bool((self.end_contents() & HAS_MORE).any())

    def end_contents(self) -> NDArray[np.int64]:
        """Return what each rank has noted about its end of the segment."""
        contents: NDArray[np.int64] = self._all[:, _END_CONTENTS + self.segment % 2]
        return contents

    def have_closed(self) -> NDArray[np.bool_]:
        """Return for each rank whether it has closed the segment."""
        return self._is_here(_CLOSED)

    def have_ended(self) -> NDArray[np.bool_]:
        """Return for each rank whether it has ended the segment."""
        return self._is_here(_ENDED)

    def begin(self, position: int) -> None:
        """Begin another segment at the position where the last one has ended on all ranks."""
        self.announce(position)
        self.segment += 1
        self._agreed = None

    def _is_here(self, field: int) -> NDArray[np.bool_]:
        self._flags.acquire()
        here: NDArray[np.bool_] = self._all[:, field + self.segment % 2] == self.segment
        return here
