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
from shardopt.comm.node_memory.polling import announced_by_all, least
from shardopt.comm.waiting import wait_briefly
from shardopt.errors import CallOrderError
from shardopt.layout.partition import Partition
from shardopt.layout.ring import RingPlan, most_waiting_nbytes
from shardopt.overlap.passes import Passes
from shardopt.overlap.slots import Slots
from shardopt.store.memory import Memory
from shardopt.transport.ring import RingReduction

MAX_WAIT_S = 0.05
"""The longest that backward waits for other ranks before it keeps a gradient to itself."""

# Fields of the flags. The ends of two segments in a row are kept apart, by the segment's parity.
_ANNOUNCED, _SUMMED, _CLOSED, _ENDED, _TOTAL, _HAS_MORE, _CONTENTS = 0, 1, 2, 4, 6, 8, 10

_rings: WeakSet["GradRing"] = WeakSet()
"""All of this process: who waits in one sums for the others, too, whatever their order."""


class _Piece(NamedTuple):
    """A parameter's part in a bucket.

    Attributes:
        place: The bucket's place in the order of travel.
        target: Its elements within the bucket.
        source: Its elements within the flattened parameter.
        numel: Elements.
        is_whole: Whether the bucket has all of the parameter.
    """

    place: int
    target: slice
    source: slice
    numel: int
    is_whole: bool


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
                param = partition.params[index]
                target, source = span.shift(-bucket.start).slice, span.shift(-param.start).slice
                is_whole = span.numel == param.numel
                piece = _Piece(place, target, source, span.numel, is_whole)
                self._pieces[index].append(piece)
                self._params_in[-1].append((index, piece))
        self._fillings: dict[int, _Filling] = {}  # by position
        self._num_waiting = 0  # pieces
        self._waiting_nbytes = 0  # whose gradients are in private memory
        expected = frozenset(expected)
        self._most_waiting_nbytes = most_waiting_nbytes(partition, expected)
        self._room = plan.depth  # buffers of positions below are free; there may be more
        self._ends = np.zeros(plan.node_size, np.int64)
        self._base = 0  # position at which the present round begins
        self._announced = self._summed = 0
        self._segment, self._is_ended, self._is_over = 1, False, False
        self._agreed: tuple[int, bool] | None = None  # between nodes; see ``extend_to``
        self._passes.begin(self._segment)
        self._restarts: list[int] = []  # positions at which older averages are forgotten
        self._arrived: set[int] = set()  # in the present round
        self._num_closed = 0  # buckets of the present round, from the first
        self._gave_up_at = -1
        self._expect(expected)
        _rings.add(self)

    # -- while backward runs -----------------------------------------------------------------------

    def put(self, param: int, grad: FloatArray) -> None:
        """Hand over this rank's gradient of a parameter, which must not change afterwards."""
        if self._is_ended:
            self._reopen()
        pieces = self._pieces[param]
        if param in self._arrived or (pieces and pieces[0].place < self._num_closed):
            self.end_round()
        self._arrived.add(param)
        base, flat, num_closed = self._base, grad.reshape(-1), self._num_closed
        is_expected = param in self._expected
        for piece in pieces:
            place = piece.place
            filling = self._fillings.get(base + place)
            if filling is None:
                filling = self._fillings[base + place] = _Filling()
            filling.params.add(param)
            if base + place < self._room:
                self._copy(base + place, piece, flat)
            else:
                filling.waiting.append((piece, flat))
                self._num_waiting += 1
                self._waiting_nbytes += piece.numel * flat.itemsize
            self._missing[place] -= is_expected
        while self._num_closed < len(self._missing) and self._missing[self._num_closed] <= 0:
            self._num_closed += 1
        if self._num_closed == num_closed and not self._num_waiting:
            return  # nothing that other ranks wait for
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
        self._reduction.progress()
        if self._fillings or self._announced < self._base:
            self._room = self._least_summed() + self._depth
            if self._num_waiting:
                self._place(self._room)
            self._announce(self._room)
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
        """The ranks of the node that have not begun to end the segment."""
        self._flags.acquire()
        are_closed = self._flags.all[:, _CLOSED + self._segment % 2] == self._segment
        return np.flatnonzero(~are_closed).tolist()

    # -- segments ----------------------------------------------------------------------------------

    def end_segment(self, *, has_more: bool) -> None:
        """Announce zeros for all rounds that this rank has not run; ``is_over`` completes it.

        Args:
            has_more: Whether this rank has gradients that it hands over in a segment of their own.
        """
        if self._is_over or not self._is_ended:
            self._reopen()
            self.end_round()
        parity, flags = self._segment % 2, self._flags
        flags.mine[_TOTAL + parity] = self._base
        flags.mine[_HAS_MORE + parity] = self._end_contents(has_more=has_more)
        flags.publish()
        flags.mine[_CLOSED + parity] = self._segment
        flags.publish()
        self._is_ended = True

    def end(self) -> tuple[int, bool]:
        """Return where the segment ends on this rank, and whether it has more for another."""
        mine, parity = self._flags.mine, self._segment % 2
        return int(mine[_TOTAL + parity]), bool(mine[_HAS_MORE + parity])

    def extend_to(self, total: int, *, has_more: bool) -> None:
        """Have the segment, which all ranks have closed, end at one position on all nodes.

        Nodes may depend on it: one that has more positions waits for zeros of the others.

        Args:
            total: The last position of all nodes; what this one does not have is zeros.
            has_more: Whether some rank of all has gradients for another segment.
        """
        self._agreed = total, has_more

    def is_over(self) -> bool:
        """Whether all ranks have ended the segment, and this one has its sums; makes progress."""
        advance_all()
        parity, flags = self._segment % 2, self._flags
        if self._announced == self._base and flags.mine[_ENDED + parity] != self._segment:
            flags.mine[_ENDED + parity] = self._segment
            flags.publish()
        total = self._total()
        is_summed = total is not None and self._summed == total
        self._is_over = is_summed and self._reduction.is_idle
        return self._is_over

    def has_more(self) -> bool:
        """Whether some rank has gradients that it hands over in another segment."""
        if self._agreed is not None:
            return self._agreed[1]
        return bool(self._flags.all[:, _HAS_MORE + self._segment % 2].any())

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
        total = self._total()
        assert total is not None
        self._base = self._announced = total
        self._flags.mine[_ANNOUNCED] = total
        self._flags.publish()
        while self._restarts:
            self._reduction.forget()
            self._restarts.pop()
        self._segment += 1
        self._agreed = None
        self._is_ended, self._is_over, self.num_rounds = False, False, 0
        self._passes.begin(self._segment)

    def _total(self) -> int | None:
        """Return the positions of all ranks once all of them have ended the segment, or None."""
        parity = self._segment % 2
        self._flags.acquire()
        if not (self._flags.all[:, _ENDED + parity] == self._segment).all():
            return None
        self._flags.acquire()
        if self._agreed is not None:
            return self._agreed[0]
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
        return least(self._flags.all, _SUMMED)

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
        """Whether too many gradients wait for other ranks, which are behind, to make room."""
        if self._waiting_nbytes <= self._most_waiting_nbytes:
            return False
        least_summed = self._least_summed()
        is_full = self._announced >= least_summed + self._depth
        return is_full and least_summed > self._gave_up_at

    def _place(self, room: int) -> None:
        """Copy what waits into the buffers of positions below ``room``, which are free."""
        for position, filling in self._fillings.items():
            if position >= room or not filling.waiting:
                continue
            for piece, flat in filling.waiting:
                self._copy(position, piece, flat)
                self._waiting_nbytes -= piece.numel * flat.itemsize
            self._num_waiting -= len(filling.waiting)
            filling.waiting.clear()

    def _copy(self, position: int, piece: _Piece, flat: FloatArray) -> None:
        """Copy a piece of a gradient into this rank's buffer of a position."""
        slot = self._slots.mine(position, piece.place)
        source = flat if piece.is_whole else flat[piece.source]
        np.copyto(slot[piece.target], source)

    def _announce(self, room: int) -> None:
        """Announce positions below ``room`` that are complete, without a gap."""
        position = self._announced
        contents = self._flags.mine[_CONTENTS:]
        while position < room and self._is_complete(position):
            filling = self._fillings.pop(position, None)
            if filling is not None:
                place = position % len(self._buckets)
                slot = self._slots.mine(position, place)
                if len(gaps := self._slots.gaps[place]):
                    slot[gaps] = 0
                if len(filling.params) < len(self._params_in[place]):
                    for index, piece in self._params_in[place]:
                        if index not in filling.params:
                            slot[piece.target] = 0
            contents[position % self._depth] = self._contents(position, filling)
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
        fields = _ANNOUNCED, _ENDED + parity, _TOTAL + parity
        announced, total = self._ends, self._total()
        ready = announced_by_all(flags.all, *fields, self._segment, announced)
        if self._agreed is not None and total is not None:  # all had ended before the look
            ready = total
        if self._summed >= ready:
            return
        self._memory.acquire()
        while self._summed < ready and self._reduction.has_room():
            position = self._summed
            while self._restarts and self._restarts[0] <= position:
                self._reduction.forget()
                self._restarts.pop(0)
            self._take(position, [position < end for end in announced.tolist()])
            self._summed = position + 1
            self._memory.publish()
            flags.mine[_SUMMED] = self._summed
            flags.publish()

    def _contents(self, position: int, filling: _Filling | None) -> int:
        """Return what the others must know of a position that is about to be announced."""
        return int(filling is not None)

    def _end_contents(self, *, has_more: bool) -> int:
        """Return what the others must know of the end of this rank's segment."""
        return int(has_more)

    def _take(self, position: int, are_announced: list[bool]) -> None:
        """Sum this rank's part of a position.

        Args:
            position: The position.
            are_announced: For each rank whether it has announced it; else it has nothing there.
        """
        contents = self._flags.all[:, _CONTENTS + position % self._depth].tolist()
        pairs = zip(are_announced, contents, strict=True)
        filled = [is_announced and content != 0 for is_announced, content in pairs]
        place = position % len(self._buckets)
        rows = self._slots.rows(position, place, filled) if any(filled) else None
        self._reduction.average(self._buckets[place], rows)


def advance_all() -> None:
    """Make progress with all rings of this process."""
    for ring in list(_rings):
        ring.advance()
