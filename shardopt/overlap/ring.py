"""A ring of buffers through which the gradients of a node's ranks pass into their average."""

import time
from collections.abc import Iterable
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.comm.waiting import wait_briefly
from shardopt.errors import CallOrderError
from shardopt.layout.partition import Partition
from shardopt.layout.ring import RingPlan, most_waiting_nbytes
from shardopt.overlap.filling import Filling, Fillings
from shardopt.overlap.passes import Passes
from shardopt.overlap.ring_board import HAS_MORE, RingBoard
from shardopt.overlap.slots import Slots
from shardopt.store.memory import Memory
from shardopt.transport.ring import RingReduction

MAX_WAIT_S = 0.05
"""The longest that backward waits for other ranks before it keeps a gradient to itself."""

FILLED = 1
"""The contents of a position for which a rank has gradients; 0 if it has none."""

_rings: WeakSet["GradRing"] = WeakSet()
"""All of this process: who waits in one sums for the others, too, whatever their order."""


class GradRing:
    """Averages the gradients of a node's ranks while backward goes on.

    [Note: gradients averaged in backward]
    In stage 2 a node has one row of averaged gradients. Each rank copies what backward computes
    into a small ring of buffers, a bucket in each. Buckets *travel* in one order on all ranks, from
    the last to the first, in *rounds*: a round holds at most one gradient of each parameter, and a
    parameter that arrives once more, as in the next micro-batch, begins the next. A *position*
    counts buckets over all rounds. Once all ranks have *announced* a position, each sums its own
    part of that bucket, in rank order, and adds the average to the row: over ranks first, over
    rounds second. When all have summed it, its buffer is free for another position, up to ``depth``
    positions later: each rank fills the first free one of its own, and tells which. All that
    happens in this rank's own hooks: there is no thread.

    Nobody waits long. A gradient that finds no room stays in private memory until there is some. A
    hook waits for room only if this rank is ahead of others, with more in private memory than the
    largest gradient, and ``MAX_WAIT_S`` at most. A rank whose backward takes another order
    announces nothing before the buckets in front are complete. The end of backward completes its
    round, with zeros for parameters that it has not reached. A bucket is *closed* once it has all
    parameters of the round before. One more that comes then begins another round, which depends on
    this rank's backwards alone and never on time. Ranks may thus need different numbers of rounds
    for as many backwards, and those that look at averages first add empty rounds until they have
    equally many.

    A *segment* ends where all ranks meet, which is in a step. A rank that has ended it has
    announced zeros for all rounds that it has not run. Nobody begins the next segment before all
    ranks have seen the end of this one, as they agree on something in between.

    On several nodes a segment ends at one position on all of them. Each rank *closes* it, when it
    knows where it ends there, and all ranks agree on the last of these positions before anybody
    waits for it: a node with more positions than others gets on only if they send their zeros.

    A buffer that a rank has nothing for is marked as empty and taken for zeros, which keeps the
    tree of [Note: the bits of a sum].

    Collective over the node: construction.

    Args:
        memory: Of the node.
        partition: The layout.
        reduction: Sums.
        plan: The ring.
        expected: The parameters that the first backward will probably reach.

    Attributes:
        late_nbytes: Bytes of gradients that have found no room in time; for others to reset.
        waited_s: Time that backward has waited for other ranks, in seconds; likewise.
        num_rounds: Rounds that this rank has ended in the present segment.
    """

    def __init__(
        self,
        memory: Memory,
        partition: Partition,
        reduction: RingReduction,
        plan: RingPlan,
        expected: Iterable[int],
    ) -> None:
        self.late_nbytes, self.waited_s, self.num_rounds = 0, 0.0, 0
        self._memory, self._reduction = memory, reduction
        self._depth, self._node_size = plan.depth, plan.node_size
        self._buckets = partition.buckets_of((1 << len(partition.params)) - 1)[::-1]
        self._slots = Slots(memory, partition, self._buckets, plan)
        self._board, self._passes = RingBoard(memory, plan.depth), Passes(memory)
        self._fillings = Fillings(partition, self._buckets, self._slots, plan.depth)
        expected = frozenset(expected)
        self._most_waiting_nbytes = most_waiting_nbytes(partition, expected)
        self._room = plan.depth  # buffers of positions below are free; there may be more
        self._base = 0  # position at which the present round begins
        self._announced = self._summed = 0
        self._is_ended = self._is_over = False
        self._passes.begin(self._board.segment)
        self._restarts: list[int] = []  # positions at which older averages are forgotten
        self._arrived: set[int] = set()  # in the present round
        self._num_closed = 0  # buckets of the present round, from the first
        self._gave_up_at = -1
        self._seen = b""
        self.expect(expected)
        _rings.add(self)

    # -- while backward runs -----------------------------------------------------------------------

    def expect(self, params: Iterable[int]) -> None:
        """Take a bucket for complete, in a round that begins, once these parameters are there.

        Those that come later begin another round, whose sums are added to the averages and rounded
        by themselves.

        Args:
            params: Those of which this rank has gradients; after a round they are those of it.
        """
        self._expected = frozenset(params)
        self._counts = [
            sum(index in self._expected for index, _ in present)
            for present in self._fillings.params_in
        ]
        self._missing = list(self._counts)

    def put(self, param: int, grad: FloatArray) -> None:
        """Hand over this rank's gradient of a parameter, which must not change afterwards."""
        if self._is_ended:
            self._reopen()
        fillings, pieces = self._fillings, self._fillings.pieces[param]
        if param in self._arrived or (pieces and pieces[0].place < self._num_closed):
            self.end_round()
        self._arrived.add(param)
        flat, num_closed, missing = grad.ravel(), self._num_closed, self._missing
        fillings.add(param, flat, self._base, self._room)
        if param in self._expected:
            for piece in pieces:
                missing[piece.place] -= 1
        while self._num_closed < len(missing) and missing[self._num_closed] <= 0:
            self._num_closed += 1
        if self._num_closed == num_closed and not fillings.num_waiting:
            return  # nothing that other ranks wait for
        self._make_room()
        if fillings.num_waiting:
            positions = [self._base + piece.place for piece in pieces]
            self.late_nbytes += fillings.waiting_nbytes_of(flat, positions)

    def end_round(self) -> None:
        """Announce zeros for all parameters that have not arrived in the present round."""
        if not self._arrived:
            return
        if self._arrived != self._expected:
            self.expect(self._arrived)
        self._arrived.clear()
        self._missing, self._num_closed = list(self._counts), 0
        self._skip_to(self._base + len(self._buckets))
        self.advance()

    def end_backward(self) -> None:
        """End the round, and note that this rank has run one backward more."""
        self.end_round()
        self._passes.add(self._base)

    def restart(self) -> None:
        """Forget all averages so far, once all ranks have summed them."""
        self._reopen()
        self.end_round()
        self._restarts.append(self._base)

    def advance(self) -> bool:
        """Make progress without waiting; return whether there was any."""
        fillings = self._fillings
        before = self._announced, self._summed, fillings.num_waiting
        self._reduction.progress()
        if fillings or self._announced < self._base:
            self._room = self._board.least_summed() + self._depth
            fillings.place(self._room)
            self._announce(self._room)
        if self._is_ended or self._summed < self._announced:
            self._sum()
        return before != (self._announced, self._summed, fillings.num_waiting)

    def look(self) -> None:
        """Make the progress that other ranks have made possible since the last look.

        What this rank makes possible itself, it makes at once; what follows from that, it tells.
        """
        now = self._board.snapshot()  # before ``advance`` looks, so that nothing is missed
        if now != self._seen or self._reduction.has_messages:
            self.advance()
            self._seen = now

    def is_averaged(self) -> bool:
        """Whether all ranks have summed as many backwards as this one has run; makes progress."""
        advance_all()
        if self._late_passes().any():
            return False
        if not self._is_ended and not self._arrived:
            self._skip_to(max(self._base, self._passes.end()))
            self.advance()
        return self._board.least_summed() >= max(self._base, self._summed)

    def ranks_behind(self) -> list[int]:
        """Return the ranks that ``is_averaged`` waits for."""
        are_behind = self._board.are_behind(max(self._base, self._summed))
        return np.flatnonzero(self._late_passes() | are_behind).tolist()

    @property
    def late_ranks(self) -> list[int]:
        """The ranks of the node that have not begun to end the segment."""
        return np.flatnonzero(~self._board.have_closed()).tolist()

    @property
    def awaited_nodes(self) -> list[int]:
        """The other nodes that what is in transit waits for."""
        return self._reduction.awaited[1]

    # -- segments ----------------------------------------------------------------------------------

    def end_segment(self, *, has_more: bool) -> None:
        """Announce zeros for all rounds that this rank has not run; ``is_over`` completes it.

        Args:
            has_more: Whether this rank has gradients that it hands over in a segment of their own.
        """
        if self._is_over or not self._is_ended:
            self._reopen()
            self.end_round()
        self._board.close(self._base, self._end_contents(has_more=has_more))
        self._is_ended = True

    def end(self) -> tuple[int, bool]:
        """Return where the segment ends on this rank, and whether it has more for another."""
        position, contents = self._board.my_end()
        return position, bool(contents & HAS_MORE)

    def extend_to(self, total: int, *, has_more: bool) -> None:
        """Have the segment, which all ranks have closed, end at one position on all nodes.

        Nodes may depend on it: one that has more positions waits for zeros of the others.

        Args:
            total: The last position of all nodes; what this one does not have is zeros.
            has_more: Whether some rank of all has gradients for another segment.
        """
        self._board.agree(total, has_more=has_more)

    def is_over(self) -> bool:
        """Whether all ranks have ended the segment, and this one has its sums; makes progress."""
        advance_all()
        if self._announced == self._base:
            self._board.end()
        self._is_over = self._board.total() == self._summed and self._reduction.is_idle
        while self._is_over and self._restarts:  # behind which nothing has come
            self._reduction.forget()
            self._restarts.pop()
        return self._is_over

    def has_more(self) -> bool:
        """Whether some rank has gradients that it hands over in another segment."""
        return self._board.has_more()

    def free(self) -> None:
        """Make no more progress: the memory is about to be released."""
        _rings.discard(self)

    def _reopen(self) -> None:
        """Begin another segment at the position where the last one has ended on all ranks."""
        if not self._is_ended:
            return
        if not self._is_over:
            raise CallOrderError(
                "step() or average_grads() must come next, on all ranks, as one of them was broken "
                "off by ranks that made other calls; got more gradients or zero_grad()."
            )
        total = self._board.total()
        assert total is not None
        self._base = self._announced = total
        self._board.begin(total)
        self._is_ended, self._is_over, self.num_rounds = False, False, 0
        self._passes.begin(self._board.segment)

    # -- inside ------------------------------------------------------------------------------------

    def _late_passes(self) -> NDArray[np.bool_]:
        """Return for each rank whether it has run fewer backwards, and may run more."""
        has_ended = self._board.have_ended()
        is_late: NDArray[np.bool_] = self._passes.are_late() & ~has_ended & (not self._is_ended)
        return is_late

    def _skip_to(self, base: int) -> None:
        """End rounds up to a position."""
        self.num_rounds += (base - self._base) // len(self._buckets)
        self._base = base

    def _make_room(self) -> None:
        """Place what waits, and wait for other ranks if they are behind this one."""
        waited_s, has_messages = 0.0, self._reduction.has_messages
        while self._advance_to_the_end() and waited_s < MAX_WAIT_S:
            start, left_s = time.monotonic(), MAX_WAIT_S - waited_s
            # This rank is ahead of its node, so it may nap; messages only move while it looks.
            is_loose = wait_briefly(self._is_loose, left_s, yields=has_messages)
            waited_s += time.monotonic() - start
            if not is_loose:
                self._gave_up_at = self._board.least_summed()
        self.waited_s += waited_s

    def _advance_to_the_end(self) -> bool:
        """Make all progress that there is; return whether other ranks hold up the rest."""
        while self.advance() and self._fillings.num_waiting:
            pass
        return self._is_stuck()

    def _is_loose(self) -> bool:
        """Whether nobody has to be waited for; makes progress with all rings of the process."""
        advance_all()
        return not self._is_stuck()

    def _is_stuck(self) -> bool:
        """Whether too many gradients wait for other ranks, which are behind, to make room."""
        if self._fillings.waiting_nbytes <= self._most_waiting_nbytes:
            return False
        least_summed = self._board.least_summed()
        is_full = self._announced >= least_summed + self._depth
        return is_full and least_summed > self._gave_up_at

    def _announce(self, room: int) -> None:
        """Announce positions below ``room`` that are complete, without a gap."""
        position, end = self._announced, min(room, self._base + self._num_closed)
        fillings, board = self._fillings, self._board
        while position < end and fillings.is_placed(position):
            filling = fillings.finish(position)
            slot = 0 if filling is None else filling.slot
            board.set_contents(position, self._contents(position, filling), slot)
            position += 1
        if position > self._announced:
            self._announced = position
            self._memory.publish()
            board.announce(position)

    def _sum(self) -> None:
        """Sum this rank's part of the positions that all ranks have announced."""
        ready = self._board.ready()
        if self._summed >= ready:
            return
        self._memory.acquire()
        while self._summed < ready and self._reduction.has_room():
            position = self._summed
            while self._restarts and self._restarts[0] <= position:
                self._reduction.forget()
                self._restarts.pop(0)
            self._take(position)
            self._end_position()

    def _end_position(self) -> None:
        """Note that this rank needs no buffer of the first position that is not summed any more."""
        self._summed += 1
        self._memory.publish()
        self._board.set_summed(self._summed)

    def _contents(self, position: int, filling: Filling | None) -> int:
        """Return what the others must know of a position that is about to be announced."""
        return 0 if filling is None else FILLED

    def _end_contents(self, *, has_more: bool) -> int:
        """Return what the others must know of the end of this rank's segment."""
        return has_more * HAS_MORE

    def _take(self, position: int) -> None:
        """Sum this rank's part of a position."""
        place, rows = position % len(self._buckets), None
        num_filled = self._board.count(position, FILLED)
        if num_filled == self._node_size:
            rows = self._slots.all_rows(self._board.slots(position), place)
        elif num_filled:
            filled = self._board.are_announced(position) & (self._board.contents(position) != 0)
            rows = self._slots.rows(self._board.slots(position), place, filled.tolist())
        self._reduction.average(self._buckets[place], rows)


def advance_all() -> None:
    """Make progress with all rings of this process."""
    for ring in list(_rings):
        ring.look()
