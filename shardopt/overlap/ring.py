"""A ring of buffers through which the gradients of a node's ranks pass into their average."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.comm.flags import NodeFlags
from shardopt.comm.waiting import wait_briefly
from shardopt.layout.partition import Partition
from shardopt.layout.ring import RingPlan
from shardopt.overlap.passes import Passes
from shardopt.overlap.slots import Slots
from shardopt.store.memory import Memory
from shardopt.transport.ring import RingReduction

MAX_WAIT_S = 0.05
"""The longest that backward waits for other ranks before it keeps a gradient to itself."""

# Fields of the flags. The ends of two segments in a row are kept apart, by the segment's parity.
_ANNOUNCED, _SUMMED, _ENDED, _TOTAL, _HAS_MORE, _CONTENTS = 0, 1, 2, 4, 6, 8

_rings: WeakSet["GradRing"] = WeakSet()
"""All of this process: who waits in one sums for the others, too, whatever their order."""


class _Piece(NamedTuple):
    """A parameter's part in a bucket.

    Attributes:
        place: The bucket's place in the order of travel.
        start: The first element within the bucket.
        first: The first element within the flattened parameter.
        numel: Elements.
    """

    place: int
    start: int
    first: int
    numel: int


@dataclass(slots=True)
class _Filling:
    """The gradients of one bucket in one round, on this rank.

    Attributes:
        params: The parameters that have arrived.
        waiting: What is not in the ring yet, with the flat gradient it is part of.
    """

    params: set[int] = field(default_factory=set)
    waiting: list[tuple[_Piece, FloatArray]] = field(default_factory=list)


class GradRing:
    """Averages the gradients of a node's ranks while backward goes on.

    [Note: gradients averaged in backward]
    In stage 2 a node has one row of averaged gradients. Each rank copies what backward computes
    into a small ring of buffers, a bucket in each. Buckets *travel* in one order on all ranks, from
    the last to the first, in *rounds*: a round holds at most one gradient of each parameter, and a
    parameter that arrives once more, as in the next micro-batch, begins the next. A *position*
    counts buckets over all rounds. Once all ranks have *announced* a position, each sums its own
    part of that bucket, in rank order, and adds the average to the row: over ranks first, over
    rounds second. When all have summed it, its buffer is free for the bucket ``depth`` positions
    later. All that happens in this rank's own hooks: there is no thread.

    Nobody waits long. A gradient that finds no room stays in private memory until there is some; a
    hook waits for room only if this rank is ahead of others, and ``MAX_WAIT_S`` at most. A rank
    whose backward takes another order announces nothing before the buckets in front are complete.
    The end of backward completes its round, with zeros for parameters that it has not reached. A
    bucket is *closed* once it has all parameters of the round before. One more that comes then
    begins another round, which depends on this rank's backwards alone and never on time. Ranks may
    thus need different numbers of rounds for as many backwards, and those that look at averages
    first add empty rounds until they have equally many.

    A *segment* ends where all ranks meet, which is in a step. A rank that has ended it has
    announced zeros for all rounds that it has not run. Nobody begins the next segment before all
    ranks have seen the end of this one, as they agree on something in between.

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
        self._depth = plan.depth
        self._buckets = partition.buckets_of((1 << len(partition.params)) - 1)[::-1]
        self._slots = Slots(memory, partition, self._buckets, plan)
        self._flags = NodeFlags(memory.arena, _CONTENTS + plan.depth)
        self._passes = Passes(memory)
        self._pieces: list[list[_Piece]] = [[] for _ in partition.params]
        self._params_in: list[list[tuple[int, _Piece]]] = []
        for place, number in enumerate(self._buckets):
            bucket = partition.buckets[number]
            self._params_in.append([])
            for index, span in partition.params_in(bucket.region, bucket):
                first = span.start - partition.params[index].start
                piece = _Piece(place, span.start - bucket.start, first, span.numel)
                self._pieces[index].append(piece)
                self._params_in[-1].append((index, piece))
        self._fillings: dict[int, _Filling] = {}  # by position
        self._num_waiting = 0
        self._base = 0  # position at which the present round begins
        self._announced = self._summed = 0
        self._segment, self._is_ended = 1, False
        self._passes.begin(self._segment)
        self._restarts: list[int] = []  # positions at which older averages are forgotten
        self._arrived: set[int] = set()  # in the present round
        self._num_closed = 0  # buckets of the present round, from the first
        self._has_more = False
        self._gave_up_at = -1
        self._expect(expected)
        _rings.add(self)

    # -- while backward runs -----------------------------------------------------------------------

    def put(self, param: int, grad: FloatArray) -> None:
        """Hand over this rank's gradient of a parameter, which must not change afterwards."""
        self._reopen()
        pieces = self._pieces[param]
        if param in self._arrived or any(piece.place < self._num_closed for piece in pieces):
            self.end_round()
        self._arrived.add(param)
        flat, is_expected = grad.reshape(-1), param in self._expected
        for piece in pieces:
            filling = self._fillings.setdefault(self._base + piece.place, _Filling())
            filling.params.add(param)
            filling.waiting.append((piece, flat))
            self._num_waiting += 1
            self._missing[piece.place] -= is_expected
        while self._num_closed < len(self._buckets) and self._missing[self._num_closed] <= 0:
            self._num_closed += 1
        self._make_room()
        if self._num_waiting:
            mine = [self._fillings.get(self._base + piece.place) for piece in pieces]
            left = [
                piece for each in mine if each for piece, array in each.waiting if array is flat
            ]
            self.late_nbytes += sum(piece.numel for piece in left) * flat.itemsize

    def end_round(self) -> None:
        """Announce zeros for all parameters that have not arrived in the present round."""
        if not self._arrived:
            return
        if self._arrived != self._expected:
            self._expect(self._arrived)
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
        before = self._announced, self._summed, self._num_waiting
        if self._fillings or self._announced < self._base:
            room = self._least_summed() + self._depth
            self._place(room)
            self._announce(room)
        if self._is_ended or self._summed < self._announced:
            self._sum()
        return before != (self._announced, self._summed, self._num_waiting)

    def is_averaged(self) -> bool:
        """Whether all ranks have summed as many backwards as this one has run; makes progress."""
        advance_all()
        if self._late_passes().any():
            return False
        if not self._is_ended and not self._arrived:
            self._skip_to(max(self._base, self._passes.end()))
            self.advance()
        return self._least_summed() >= max(self._base, self._summed)

    def ranks_behind(self) -> list[int]:
        """Return the ranks that ``is_averaged`` waits for."""
        self._flags.acquire()
        least = max(self._base, self._summed)
        is_behind = self._late_passes() | (self._flags.all[:, _SUMMED] < least)
        return np.flatnonzero(is_behind).tolist()

    @property
    def late_ranks(self) -> list[int]:
        """The ranks of the node that have not ended the segment."""
        total = self._total()
        if total is not None:
            return []
        ended = self._flags.all[:, _ENDED + self._segment % 2] == self._segment
        return np.flatnonzero(~ended).tolist()

    # -- segments ----------------------------------------------------------------------------------

    def end_segment(self, *, has_more: bool) -> None:
        """Announce zeros for all rounds that this rank has not run; ``is_over`` completes it.

        Args:
            has_more: Whether this rank has gradients that it hands over in a segment of their own.
        """
        self._reopen()
        self.end_round()
        self._has_more = has_more
        self._is_ended = True

    def is_over(self) -> bool:
        """Whether all ranks have ended the segment, and this one has its sums; makes progress."""
        advance_all()
        parity, flags = self._segment % 2, self._flags
        if self._announced == self._base and flags.mine[_ENDED + parity] != self._segment:
            flags.mine[_TOTAL + parity] = self._base
            flags.mine[_HAS_MORE + parity] = self._has_more
            flags.publish()
            flags.mine[_ENDED + parity] = self._segment
            flags.publish()
        total = self._total()
        return total is not None and self._summed == total

    def has_more(self) -> bool:
        """Whether some rank has gradients that it hands over in another segment."""
        return bool(self._flags.all[:, _HAS_MORE + self._segment % 2].any())

    def free(self) -> None:
        """Make no more progress: the memory is about to be released."""
        _rings.discard(self)

    def _reopen(self) -> None:
        """Begin another segment at the position where the last one has ended on all ranks."""
        if not self._is_ended:
            return
        total = self._total()
        assert total is not None
        self._base = self._announced = total
        self._flags.mine[_ANNOUNCED] = total
        self._flags.publish()
        while self._restarts:
            self._reduction.forget()
            self._restarts.pop()
        self._segment += 1
        self._is_ended, self.num_rounds = False, 0
        self._passes.begin(self._segment)

    def _total(self) -> int | None:
        """Return the positions of all ranks once all of them have ended the segment, or None."""
        parity = self._segment % 2
        self._flags.acquire()
        if not (self._flags.all[:, _ENDED + parity] == self._segment).all():
            return None
        self._flags.acquire()
        return int(self._flags.all[:, _TOTAL + parity].max())

    # -- inside ------------------------------------------------------------------------------------

    def _late_passes(self) -> NDArray[np.bool_]:
        """Return for each rank whether it has run fewer backwards, and may run more."""
        self._flags.acquire()
        has_ended = self._flags.all[:, _ENDED + self._segment % 2] == self._segment
        is_late: NDArray[np.bool_] = self._passes.are_late() & ~has_ended & (not self._is_ended)
        return is_late

    def _skip_to(self, base: int) -> None:
        """End rounds up to a position."""
        self.num_rounds += (base - self._base) // len(self._buckets)
        self._base = base

    def _expect(self, params: Iterable[int]) -> None:
        """Take a bucket for complete once these parameters of it have arrived."""
        self._expected = frozenset(params)
        self._counts = [
            sum(index in self._expected for index, _ in present) for present in self._params_in
        ]
        self._missing = list(self._counts)

    def _least_summed(self) -> int:
        self._flags.acquire()
        return int(self._flags.all[:, _SUMMED].min())

    def _make_room(self) -> None:
        """Place what waits, and wait for other ranks if they are behind this one."""
        waited_s = 0.0
        while self._advance_to_the_end() and waited_s < MAX_WAIT_S:
            start = time.monotonic()
            is_loose = wait_briefly(self._is_loose, MAX_WAIT_S - waited_s)
            waited_s += time.monotonic() - start
            if not is_loose:
                self._gave_up_at = self._least_summed()
        self.waited_s += waited_s

    def _advance_to_the_end(self) -> bool:
        """Make all progress that there is; return whether other ranks hold up the rest."""
        while self.advance() and self._num_waiting:
            pass
        return self._is_stuck()

    def _is_loose(self) -> bool:
        """Whether nobody has to be waited for; makes progress with all rings of the process."""
        advance_all()
        return not self._is_stuck()

    def _is_stuck(self) -> bool:
        """Whether gradients wait for other ranks, which are behind this one, to make room."""
        least = self._least_summed()
        is_full = self._announced >= least + self._depth
        return self._num_waiting > 0 and is_full and least > self._gave_up_at

    def _place(self, room: int) -> None:
        """Copy what waits into the buffers of positions below ``room``, which are free."""
        for position, filling in self._fillings.items():
            if position >= room or not filling.waiting:
                continue
            slot = self._slots.mine(position, position % len(self._buckets))
            for piece, flat in filling.waiting:
                source = flat[piece.first : piece.first + piece.numel]
                np.copyto(slot[piece.start : piece.start + piece.numel], source)
            self._num_waiting -= len(filling.waiting)
            filling.waiting.clear()

    def _announce(self, room: int) -> None:
        """Announce positions below ``room`` that are complete, without a gap."""
        position = self._announced
        contents = self._flags.mine[_CONTENTS:]
        while position < room and self._is_complete(position):
            filling = self._fillings.pop(position, None)
            if filling is not None:
                place = position % len(self._buckets)
                slot = self._slots.mine(position, place)
                slot[self._slots.gaps[place]] = 0
                for index, piece in self._params_in[place]:
                    if index not in filling.params:
                        slot[piece.start : piece.start + piece.numel] = 0
            contents[position % self._depth] = filling is not None
            position += 1
        if position > self._announced:
            self._announced = position
            self._memory.publish()
            self._flags.mine[_ANNOUNCED] = position
            self._flags.publish()

    def _is_complete(self, position: int) -> bool:
        """Whether all gradients of a position are in its buffer, and no more will come."""
        filling = self._fillings.get(position)
        if filling is not None and filling.waiting:
            return False
        return position - self._base < self._num_closed

    def _sum(self) -> None:
        """Sum this rank's part of the positions that all ranks have announced."""
        flags, parity = self._flags, self._segment % 2
        ended = flags.all[:, _ENDED + parity] == self._segment
        while True:  # until what a rank has announced is known to be of this segment
            flags.acquire()
            announced, before = flags.all[:, _ANNOUNCED].copy(), ended
            flags.acquire()
            ended = flags.all[:, _ENDED + parity] == self._segment
            if (ended == before).all():
                break
        announced[ended] = flags.all[ended, _TOTAL + parity]
        ready = int(announced.max() if ended.all() else announced[~ended].min())
        if self._summed >= ready:
            return
        self._memory.acquire()
        while self._summed < ready:
            position = self._summed
            while self._restarts and self._restarts[0] <= position:
                self._reduction.forget()
                self._restarts.pop(0)
            contents = flags.all[:, _CONTENTS + position % self._depth]
            filled = (position < announced) & (contents != 0)
            if filled.any():
                place = position % len(self._buckets)
                rows = self._slots.rows(position, place, filled)
                self._reduction.average(self._buckets[place], rows)
            self._summed = position + 1
            self._memory.publish()
            flags.mine[_SUMMED] = self._summed
            flags.publish()


def advance_all() -> None:
    """Make progress with all rings of this process."""
    for ring in list(_rings):
        ring.advance()
