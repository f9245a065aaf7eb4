"""All memory of an optimizer on this rank: a region's buffers after the other, and the state."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend
from shardopt.comm.node_memory.arena import Arena, NodeMemory
from shardopt.comm.node_memory.fence import full_fence
from shardopt.comm.node_memory.limits import read_memory_room
from shardopt.comm.node_memory.private_view import PrivateView
from shardopt.comm.node_memory.writes import write_tracking
from shardopt.layout.node_arrays import (
    NodeArrays,
    plan_grad_arrays,
    plan_param_arrays,
    plan_state_arrays,
)
from shardopt.layout.partition import Partition
from shardopt.layout.state_spec import PARAM_KEY
from shardopt.store.buffers import RegionArrays, ShardBuffers
from shardopt.store.state import StateStore

_Arrays = dict[str, FloatArray]
"""The arrays of a region, by key."""

_NUM_PIECES = 2  # of each region that users can write to


@dataclass(frozen=True, slots=True, eq=False)
class RegionMemory:
    """The memory of one region, from the node's arena.

    Attributes:
        buffers: Its parameters and gradients.
        state: The optimizer state of the node's shards of it, by key.
        own_state: The same, as this rank may write to it.
        pieces: See ``Memory.pieces``: that of the parameters, and that of the state.
    """

    buffers: ShardBuffers
    state: _Arrays
    own_state: _Arrays
    pieces: tuple[tuple[NodeArrays, PrivateView], tuple[NodeArrays, PrivateView]]


class Memory:
    """The buffers of all regions, and the optimizer state of the node's shards.

    Args:
        place: The node and node rank of this rank.
        arena: The memory of the node.
        backend: Allocates in it.

    Attributes:
        arena: As given.
        buffers: One for each region.
        state: See ``StateStore``.
        pieces: The memory of parameters and that of state, of one region after another: its layout,
            and this rank's view of it.
    """

    def __init__(self, place: tuple[int, int], arena: Arena, backend: Backend) -> None:
        self.buffers: list[ShardBuffers] = []
        self.state = StateStore()
        self.pieces: list[tuple[NodeArrays, PrivateView]] = []
        self._place = place
        self.arena = arena
        self._backend = backend

    def allocate(self, partition: Partition, index: int) -> RegionMemory:
        """Allocate a region, which is not in use before ``extend``.

        Collective over the node.

        Args:
            partition: The layout.
            index: Number of the region.
        """
        node = self._place[0]
        params_layout = plan_param_arrays(partition, [index])
        state_layout = plan_state_arrays(partition, node, [index])
        params, state = self._share_twice(params_layout), self._share_twice(state_layout)
        layout = plan_grad_arrays(partition, node, [index])
        grads = _arrays(layout, self._share(layout, private=False).memory)
        of_params = _arrays(params_layout, params.shared)[PARAM_KEY]
        own_params = _arrays(params_layout, params.view)[PARAM_KEY]
        sums = grads.pop("sum", np.empty(0, of_params.dtype))
        arrays = RegionArrays(of_params, own_params, [*grads.values()], sums)
        return RegionMemory(
            buffers=ShardBuffers(partition, index, self._place, arrays),
            state=_arrays(state_layout, state.shared),
            own_state=_arrays(state_layout, state.view),
            pieces=((params_layout, params), (state_layout, state)),
        )

    def extend(self, regions: Sequence[RegionMemory]) -> None:
        """Add regions behind the present ones."""
        for region in regions:
            self.buffers.append(region.buffers)
            self.state.append(region.state, region.own_state)
            self.pieces += region.pieces

    def select(self, partition: Partition, kept: Sequence[int]) -> None:
        """Release all regions but some, which are the first ones of a partition.

        Args:
            partition: The new layout.
            kept: Their numbers so far, in order.
        """
        pieces = self.pieces
        self.buffers = [self.buffers[number] for number in kept]
        self.state.select(kept)
        self.pieces = []
        for index, number in enumerate(kept):
            self.buffers[index].place(partition, index, self._place)
            first = _NUM_PIECES * number
            of_region = pieces[first : first + _NUM_PIECES]
            self.pieces += [(layout.of_region(index), view) for layout, view in of_region]

    @property
    def overflows_easily(self) -> bool:
        """Whether some gradients have 16 bits: float16 overflows, and its losses are scaled."""
        return not all(buffers.holds_sums for buffers in self.buffers)

    def publish(self) -> None:
        """Make this rank's stores visible; see [Note: when stores become visible]."""
        full_fence()

    def acquire(self) -> None:
        """See the stores of other ranks; see [Note: when stores become visible]."""
        full_fence()

    def free(self) -> None:
        """Release everything; arrays that users hold stay valid."""
        for buffers in self.buffers:
            buffers.free()
        self.buffers.clear()
        self.state.free()
        self.pieces.clear()

    def _budget(self) -> int:
        """Return how many bytes of copies this rank may keep: those it has, and a share of room."""
        kept_nbytes = sum(view.kept_nbytes for _, view in self.pieces)
        room = read_memory_room()
        return kept_nbytes + (0 if room is None else room.free_nbytes // 2 // self.arena.comm.size)

    def _share_twice(self, layout: NodeArrays) -> PrivateView:
        """Allocate arrays of which this rank has a view of its own, too."""
        piece = self._share(layout, private=True)
        return PrivateView(piece.memory, piece.view, write_tracking(), self._budget)

    def _share(self, layout: NodeArrays, *, private: bool) -> NodeMemory:
        return self._backend.share(self.arena, layout.nbytes, private=private)


def _arrays(layout: NodeArrays, memory: NDArray[np.uint8]) -> _Arrays:
    """Return the arrays of a region by key."""
    return {array.key: memory[array.slice].view(array.dtype) for array in layout.arrays}
