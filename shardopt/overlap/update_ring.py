"""A ring of buffers from which parameters are updated, with what ranks know of each gradient."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardopt.layout.partition import Partition
from shardopt.layout.ring import RingPlan
from shardopt.overlap.filling import Filling, Piece
from shardopt.overlap.ring import FILLED, GradRing
from shardopt.overlap.ring_board import HAS_MORE
from shardopt.store.memory import Memory
from shardopt.transport.updating_exchange import Updating

if TYPE_CHECKING:
    from shardopt._typing import FloatArray

_FAILED = 2  # in the contents of a position, or of the end of a segment
_NUM_FLAGS = 2  # bits of contents, which those of gradients follow; see ``_known_of``
_LATER, _HERE, _NEVER = 0, 1, 2  # a gradient of a rank


class UpdateRing(GradRing):
    """Updates parameters once all ranks have their gradients; see ``GradRing``.

    [Note: updated in backward]
    A weight may be written once nobody reads it any more. All ranks of a node have the same bytes,
    so it is written when *all* of them have its gradient; ranks of other nodes have then sent
    theirs for the same sum. Autograd hands a gradient over when all uses of the parameter have gone
    backward, and each use reads the weight before that, or in the same node of the graph; what
    checkpoints of activations compute again comes before, too. What reads it later has kept the
    weight without asking for its gradient (``weight.detach()``), or goes backward for the second
    time. So the weight's version is raised when its gradient arrives, as by a write: autograd
    refuses to use what it has saved of it. Users must not read weights themselves between backward
    and step, such as for a forward: nobody would notice.

    A gradient is used once. So it must be known that it is whole: that no rank has another part of
    it. With each position a rank announces for each parameter of the bucket whether its gradient is
    *here*, will *never* come, as its backward is over, or may come *later*: that is the case if the
    bucket was closed without it, because the step before had none. Nobody has to wait for it: if
    some rank has the gradient and another may have it later, each takes what it has out of the ring
    again. Those gradients, and late ones, travel in a second segment, in which all ranks meet in
    ``step()``, and where nothing comes later. All ranks decide by the same announcements and so
    alike. A rank that says *later* once keeps to it for all buckets of the parameter.

    A rank that knows of an error marks what it announces. No rank updates a marked position.

    A position is *started* once all ranks of the node have announced it, and *settled* once all
    nodes have, which on one node is at once. Only then are its buffers free. See
    [Note: updated between nodes].

    Args:
        memory: Of the node.
        partition: The layout.
        reduction: Updates.
        plan: The ring.
        expected: The parameters that the first backward will probably reach.

    Attributes:
        has_failed: Whether this rank knows of an error in the present step; to be set.
        updated: Bit mask of the parameters that have been updated in the present step.
        kept: This rank's gradients that were taken out of the ring, by parameter.
        is_split: Whether any rank has taken gradients out; the same on all ranks after a segment.
        twice: The parameters that ranks had gradients of once they were updated; likewise.
    """

    def __init__(
        self,
        memory: Memory,
        partition: Partition,
        reduction: Updating,
        plan: RingPlan,
        expected: Iterable[int],
    ) -> None:
        super().__init__(memory, partition, reduction, plan, expected)
        self._updating, self._numels = reduction, [param.numel for param in partition.params]
        params_in = self._fillings.params_in
        self._masks = [sum(1 << index for index, _ in params) for params in params_in]
        self._all_here = [((1 << len(params)) - 1) << _NUM_FLAGS | FILLED for params in params_in]
        self._started = 0  # positions up to here have been started
        most = max([1, *map(len, params_in)])
        shape = plan.node_size, plan.depth, most
        size = int(np.prod(shape))
        node = memory.arena.allocate(size).memory
        self._known: NDArray[np.uint8] = node[:size].reshape(shape)
        self._mine = self._known[memory.arena.comm.rank]
        self._is_backward_over = False  # the backward of this rank, in this segment
        self._open: set[int] = set()  # parameters that may come later, as others have been told
        self.begin_step()

    def begin_step(self) -> None:
        """Forget what has happened in the step before."""
        self.has_failed = self.is_split = False
        self.updated = self._updated_before = 0
        self.kept: dict[int, FloatArray] = {}
        self.twice: set[int] = set()

    def begin_rest(self) -> None:
        """Get ready for a segment with the rest of a step's gradients, which are put in one round.

        So no bucket may be closed before it has all of its parameters, or the round is over.
        """
        self.is_split = False
        self.expect(range(len(self._numels)))

    # -- while backward runs -----------------------------------------------------------------------

    def has_closed(self, param: int) -> bool:
        """Whether the buckets of a parameter that has not arrived have been closed without it."""
        return any(piece.place < self._num_closed for piece in self._fillings.pieces[param])

    def hold(self, param: int) -> None:
        """Note that this rank has a gradient of a closed bucket, which it will put later."""
        self._open.add(param)

    def end_backward(self) -> None:
        """See ``GradRing.end_backward``."""
        self._reopen()
        self._is_backward_over = True
        super().end_backward()

    # -- segments ----------------------------------------------------------------------------------

    def end_segment(self, *, has_more: bool) -> None:
        """See ``GradRing.end_segment``."""
        if self._is_over or not self._is_ended:
            self._reopen()
        self._is_backward_over = True
        super().end_segment(has_more=has_more)

    # -- inside ------------------------------------------------------------------------------------

    def _reopen(self) -> None:
        if self._is_ended:
            self._is_backward_over, self._updated_before = False, self.updated
            self._open.clear()
        super()._reopen()

    def _contents(self, position: int, filling: Filling | None) -> int:
        known = self._mine[position % self._depth]
        params = self._fillings.params_in[position % len(self._buckets)]
        for column, (index, _) in enumerate(params):
            if filling is not None and index in filling.params:
                known[column] = _HERE
            elif self._is_backward_over and index not in self._open:
                known[column] = _NEVER
            else:
                known[column] = _LATER
                self._open.add(index)
        return (filling is not None) * FILLED | self.has_failed * _FAILED

    def _end_contents(self, *, has_more: bool) -> int:
        return has_more * HAS_MORE | self.has_failed * _FAILED

    def _sum(self) -> None:
        """Start what all ranks of the node have announced, and settle what all nodes have."""
        ready = self._board.ready()
        if self._summed >= ready:
            return
        self._memory.acquire()
        while self._started < ready and self._updating.has_room():
            self._start(self._started)
            self._started += 1
        while self._summed < self._started:
            known = self._updating.gathered_known()
            if known is None:
                break
            self._settle(self._summed, known)
            self._end_position()

    def _start(self, position: int) -> None:
        """Hand the gradients of a position to the reduction, with what this node knows of them."""
        board, slots, place = self._board, self._slots, position % len(self._buckets)
        num_params = len(self._fillings.params_in[place])
        known = self._known[:, position % self._depth, :num_params]
        rows, bits = None, self._all_here[place]
        if board.count(position, FILLED) == self._node_size and (known == _HERE).all():
            rows = slots.all_rows(board.slots(position), place)
        else:
            are_announced = board.are_announced(position)
            contents = np.where(
                are_announced, board.contents(position), board.end_contents() & _FAILED
            )
            bits = _known_of(contents, np.where(are_announced[:, None], known, _NEVER))
            if bits & FILLED:
                filled = contents & FILLED != 0
                rows = slots.rows(board.slots(position), place, filled.tolist())
        num_bits = _NUM_FLAGS + 2 * num_params
        self._updating.start(self._buckets[place], rows, bits, (num_bits + 7) // 8)

    def _settle(self, position: int, known: int) -> None:
        """Have the parameters of a position updated, and keep gradients that are not whole.

        Args:
            position: The position.
            known: What all ranks have announced, on all nodes; see ``_known_of``.
        """
        place, present = position % len(self._buckets), 0
        if known == self._all_here[place] and not self._updated_before:
            present = self._masks[place]
        elif known & FILLED and not known & _FAILED:
            present = self._select(position, known)
        self._updating.settle(present)
        self.updated |= present

    def _select(self, position: int, known: int) -> int:
        """Return a bit mask of what can be updated; keep gradients that are not whole."""
        params = self._fillings.params_in[position % len(self._buckets)]
        is_mine = self._mine[position % self._depth] == _HERE
        present, is_announced = 0, position < self._announced
        for column, (index, piece) in enumerate(params):
            is_here = known >> (_NUM_FLAGS + column) & 1
            is_open = known >> (_NUM_FLAGS + len(params) + column) & 1
            if not is_here:
                continue
            if is_open:
                self.is_split = True
                if is_announced and is_mine[column]:
                    self._keep(index, piece, position)
            elif self._updated_before >> index & 1:
                self.twice.add(index)
            else:
                present |= 1 << index
        return present

    def _keep(self, index: int, piece: Piece, position: int) -> None:
        """Copy this rank's part of a gradient out of its buffer, for the next segment."""
        slot = self._fillings.buffer(position)
        if index not in self.kept:
            self.kept[index] = np.empty(self._numels[index], slot.dtype)
        self.kept[index][piece.source] = slot[piece.target]


def _known_of(contents: NDArray[np.int64], known: NDArray[np.uint8]) -> int:
    """Return what the ranks of this node have announced of a position, as bits.

    Those of all nodes are united by a bitwise or.

    Args:
        contents: [num_ranks] of the position.
        known: [num_ranks, num_params] of its gradients.

    Returns:
        The contents of any rank, then a bit for each parameter of which some rank has a gradient,
        then one for each of which some rank may have one later.
    """
    flags = int(np.bitwise_or.reduce(contents))
    columns = np.concatenate([(known == each).any(axis=0) for each in (_HERE, _LATER)])
    packed = np.packbits(columns, bitorder="little").tobytes()
    return flags | int.from_bytes(packed, "little") << _NUM_FLAGS
