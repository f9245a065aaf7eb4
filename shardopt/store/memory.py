"""All memory of an optimizer on this rank: a region's buffers after the other, and the state."""

from collections.abc import Mapping

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

_Arrays = Mapping[int, dict[str, FloatArray]]
"""The arrays of regions, by index and key."""


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
        pieces: The memory of parameters and of state, as it was allocated: its layout, and this
            rank's view of it.
    """

    def __init__(self, place: tuple[int, int], arena: Arena, backend: Backend) -> None:
        self.buffers: list[ShardBuffers] = []
        self.state = StateStore()
        self.pieces: list[tuple[NodeArrays, PrivateView]] = []
        self._place = place
        self.arena = arena
        self._backend = backend

    def extend(self, partition: Partition) -> None:
        """Allocate the regions that are new in a partition. Collective over the node."""
        regions = range(len(self.buffers), len(partition.regions))
        if not regions:
            return
        node = self._place[0]
        pieces = [
            plan_param_arrays(partition, regions),
            plan_state_arrays(partition, node, regions),
        ]
        views = [self._share_twice(layout) for layout in pieces]
        params, state = (_arrays(p, view.shared) for p, view in zip(pieces, views, strict=True))
        own_params, own_state = (_arrays(p, v.view) for p, v in zip(pieces, views, strict=True))
        layout = plan_grad_arrays(partition, node, regions)
        grads = _arrays(layout, self._share(layout, private=False).memory)
        self.pieces += zip(pieces, views, strict=True)
        for index in regions:
            of_params, own_of_params = params[index][PARAM_KEY], own_params[index][PARAM_KEY]
            sums = grads[index].pop("sum", np.empty(0, of_params.dtype))
            arrays = RegionArrays(of_params, own_of_params, [*grads[index].values()], sums)
            self.buffers.append(ShardBuffers(partition, index, self._place, arrays))
            self.state.append(state[index], own_state[index])

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
        """Let go of everything; arrays that users hold stay valid."""
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
    """Return the arrays of each region by key."""
    regions: dict[int, dict[str, FloatArray]] = {}
    for array in layout.arrays:
        regions.setdefault(array.region, {})[array.key] = memory[array.slice].view(array.dtype)
    return regions
