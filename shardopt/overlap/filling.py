"""This rank's gradients on their way into its buffers of a ring."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from shardopt._typing import FloatArray
from shardopt.backends.cpu.copying import copy_past_cache
from shardopt.layout.partition import Partition
from shardopt.overlap.slots import Slots

_NONE = -1


class Piece(NamedTuple):
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
class Filling:
    """The gradients of one bucket in one round, on this rank.

    Attributes:
        params: The parameters that have arrived.
        waiting: What is not in the buffer yet, with the flat gradient it is part of.
        slot: The number of the buffer, once anything is in it.
    """

    slot: int = _NONE
    params: set[int] = field(default_factory=set)
    waiting: list[tuple[Piece, FloatArray]] = field(default_factory=list)


class Fillings:
    """Copies gradients into buffers, as soon as one is free for their position.

    The first free one is taken, so that few are in use as long as ranks go through positions
    together. Copies go past the cache: other cores have read the buffers before, and fetching each
    line from their caches takes three times as long as writing it to memory.

    Args:
        partition: The layout.
        buckets: Their numbers in the order of travel.
        slots: The buffers.
        depth: How many there are.

    Attributes:
        pieces: The parts of each parameter.
        params_in: For each place in the order of travel, the parameters there, with their parts.
        num_waiting: Pieces that wait for a buffer, in private memory.
        waiting_nbytes: Their bytes.
    """

    def __init__(
        self, partition: Partition, buckets: Sequence[int], slots: Slots, depth: int
    ) -> None:
        self.num_waiting = self.waiting_nbytes = 0
        self.pieces: list[list[Piece]] = [[] for _ in partition.params]
        self.params_in: list[list[tuple[int, Piece]]] = []
        self._slots, self._num_places = slots, len(buckets)
        self._at: dict[int, Filling] = {}  # by position
        self._users = [_NONE] * depth  # for each buffer the position that used it last
        for place, number in enumerate(buckets):
            bucket = partition.buckets[number]
            self.params_in.append([])
            for index, span in partition.params_in(bucket.region, bucket):
                param = partition.params[index]
                target, source = span.shift(-bucket.start).slice, span.shift(-param.start).slice
                is_whole = span.numel == param.numel
                piece = Piece(place, target, source, span.numel, is_whole)
                self.pieces[index].append(piece)
                self.params_in[-1].append((index, piece))

    def __bool__(self) -> bool:
        return bool(self._at)

    def add(self, param: int, flat: FloatArray, base: int, room: int) -> None:
        """Add a gradient.

        Args:
            param: The number of the parameter.
            flat: [numel] the gradient, contiguous; it must not change before it is in its buffers.
            base: The position at which its round begins.
            room: The buffers of positions below are free.
        """
        for piece in self.pieces[param]:
            position = base + piece.place
            filling = self._at.get(position)
            if filling is None:
                filling = self._at[position] = Filling()
            filling.params.add(param)
            if position < room:
                self._copy(position, filling, room, piece, flat)
            else:
                filling.waiting.append((piece, flat))
                self.num_waiting += 1
                self.waiting_nbytes += piece.numel * flat.itemsize

    def place(self, room: int) -> None:
        """Copy what waits into the buffers of positions below ``room``, which are free."""
        if not self.num_waiting:
            return
        for position, filling in self._at.items():
            if position >= room or not filling.waiting:
                continue
            for piece, flat in filling.waiting:
                self._copy(position, filling, room, piece, flat)
                self.waiting_nbytes -= piece.numel * flat.itemsize
            self.num_waiting -= len(filling.waiting)
            filling.waiting.clear()

    def waiting_nbytes_of(self, flat: FloatArray, positions: Iterable[int]) -> int:
        """Return how many bytes of a gradient wait for the buffers of some positions."""
        found = [self._at[position].waiting for position in positions if position in self._at]
        left = [piece.numel for waiting in found for piece, array in waiting if array is flat]
        return sum(left) * flat.itemsize

    def is_placed(self, position: int) -> bool:
        """Whether nothing of a position waits."""
        filling = self._at.get(position)
        return filling is None or not filling.waiting

    def finish(self, position: int) -> Filling | None:
        """Take a position out, whose buffer has zeros in the place of what has not arrived then.

        Returns:
            What has arrived; None if nothing has, and the buffer has not been touched.
        """
        filling = self._at.pop(position, None)
        if filling is None:
            return None
        place = position % self._num_places
        slot = self._slots.mine(filling.slot, place)
        if len(gaps := self._slots.gaps[place]):
            slot[gaps] = 0
        if len(filling.params) < len(self.params_in[place]):
            for index, piece in self.params_in[place]:
                if index not in filling.params:
                    slot[piece.target] = 0
        return filling

    def buffer(self, position: int) -> FloatArray:
        """Return the buffer of a position that is filled, and that not all ranks have summed."""
        return self._slots.mine(self._users.index(position), position % self._num_places)

    def _copy(
        self, position: int, filling: Filling, room: int, piece: Piece, flat: FloatArray
    ) -> None:
        """Copy a piece of a gradient into this rank's buffer of a position."""
        if filling.slot == _NONE:
            last = room - len(self._users)  # positions before are summed by all
            filling.slot = next(slot for slot, user in enumerate(self._users) if user < last)
            self._users[filling.slot] = position
        slot = self._slots.mine(filling.slot, piece.place)
        source = flat if piece.is_whole else flat[piece.source]
        copy_past_cache(slot[piece.target].view(np.uint8), source.view(np.uint8))
