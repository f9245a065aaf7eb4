"""All memory of an optimizer on this rank: a region's buffers after the other, and the state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.backends.codes import shaped
from shardopt.comm.node_memory.arena import Arena, NodeMemory
from shardopt.comm.node_memory.fence import full_fence
from shardopt.comm.node_memory.limits import read_memory_room
from shardopt.comm.node_memory.private_view import PrivateView
from shardopt.comm.node_memory.writes import write_tracking
from shardopt.layout.node_arrays import (
    GRAD_KEY,
    NodeArray,
    NodeArrays,
    plan_average_arrays,
    plan_grad_arrays,
    plan_param_arrays,
    plan_state_arrays,
    plan_sum_arrays,
)
from shardopt.layout.partition import Partition
from shardopt.layout.span import Span
from shardopt.layout.state_spec import PARAM_KEY
from shardopt.store.buffers import ShardBuffers
from shardopt.store.residence import HomeArrays, LocatedRegion, Residence
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
        averages: See ``Memory.averages``; one, or none.
        located: Its arrays where frameworks and steps use them.
    """

    buffers: ShardBuffers
    state: _Arrays
    own_state: _Arrays
    pieces: tuple[tuple[NodeArrays, PrivateView], tuple[NodeArrays, PrivateView]]
    averages: Sequence[tuple[NodeArrays, PrivateView]]
    located: LocatedRegion


class Memory:
    """The buffers of all regions, and the optimizer state of the node's shards.

    Args:
        place: The node and node rank of this rank.
        arena: The memory of the node.
        residence: Where frameworks and steps use it.
        has_one_row: Whether the node has one row of averaged gradients, of which each rank has a
            view of its own, rather than a row for each rank.
        keeps_views: Whether pages that a rank writes to step after step may stay its own; see
            ``PrivateView``. Not where the node's copy changes before a rank has looked for writes.

    Attributes:
        arena: As given.
        residence: As given.
        has_one_row: As given.
        buffers: One for each region.
        state: See ``StateStore``.
        pieces: The memory of parameters and that of state, of one region after another: its layout,
            and this rank's view of it.
        averages: Likewise of averaged gradients, if there is one row of them.
    """

    def __init__(
        self,
        place: tuple[int, int],
        arena: Arena,
        residence: Residence,
        *,
        has_one_row: bool = False,
        keeps_views: bool = True,
    ) -> None:
        self.buffers: list[ShardBuffers] = []
        self.state = StateStore()
        self.pieces: list[tuple[NodeArrays, PrivateView]] = []
        self.averages: list[tuple[NodeArrays, PrivateView]] = []
        self.has_one_row, self._keeps_views = has_one_row, keeps_views
        self._place = place
        self.arena = arena
        self.residence = residence

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
        of_state = _arrays(state_layout, state.shared)
        grads, averages = self._share_grads(partition, index)
        home = HomeArrays(
            params=_arrays(params_layout, params.shared)[PARAM_KEY],
            own_params=_arrays(params_layout, params.view)[PARAM_KEY],
            state=of_state,
            **grads,
        )
        located = self.residence.locate(partition, index, self._place, home)
        return RegionMemory(
            buffers=ShardBuffers(partition, index, self._place, located.arrays),
            state=of_state,
            own_state=_arrays(state_layout, state.view),
            pieces=((params_layout, params), (state_layout, state)),
            averages=averages,
            located=located,
        )

    def extend(self, regions: Sequence[RegionMemory]) -> None:
        """Add regions behind the present ones."""
        for region in regions:
            self.buffers.append(region.buffers)
            self.state.append(region.state, region.own_state, region.located.state)
            self.pieces += region.pieces
            self.averages += region.averages
        self.residence.extend([region.located for region in regions])

    def select(self, partition: Partition, kept: Sequence[int]) -> None:
        """Release all regions but some, which are the first ones of a partition.

        Args:
            partition: The new layout.
            kept: Their numbers so far, in order.
        """
        pieces = self.pieces
        self.averages = [self.averages[number] for number in kept] if self.averages else []
        self.buffers = [self.buffers[number] for number in kept]
        self.state.select(kept)
        self.residence.select(kept)
        self.pieces = []
        for index, number in enumerate(kept):
            self.buffers[index].place(partition, index, self._place)
            first = _NUM_PIECES * number
            of_region = pieces[first : first + _NUM_PIECES]
            self.pieces += [(layout.of_region(index), view) for layout, view in of_region]

    @property
    def overflows_easily(self) -> bool:
        """Whether some gradients are float16; bfloat16 has the range of float32."""
        return any(buffers.region.dtype == "float16" for buffers in self.buffers)

    def publish(self) -> None:
        """Make this rank's stores visible; see [Note: when stores become visible]."""
        self.residence.publish()
        full_fence()

    def acquire(self) -> None:
        """See the stores of other ranks; see [Note: when stores become visible]."""
        full_fence()
        self.residence.acquire()

    def local_runs(self, partition: Partition, params: int) -> list[list[Span]]:
        """Return for each region the spans of some parameters, counted from its start.

        Args:
            partition: The layout.
            params: Bit mask of the parameters.
        """
        return [
            [buffers.local(run) for run in partition.runs(index, params)]
            for index, buffers in enumerate(self.buffers)
        ]

    def params_of(self, region: int) -> tuple[NodeArray, PrivateView]:
        """Return the parameters of a region as this rank sees them."""
        layout, view = self.pieces[_NUM_PIECES * region]
        return layout.arrays[0], view

    def free(self) -> None:
        """Release everything; arrays that users hold stay valid."""
        for buffers in self.buffers:
            buffers.free()
        self.buffers.clear()
        self.state.free()
        self.pieces.clear()
        self.averages.clear()
        self.residence.free()

    def _budget(self) -> int:
        """Return how many bytes of copies this rank may keep: those it has, and a share of room.

        None while the state changes elsewhere: what is brought home would look written in copies.
        """
        if not self.residence.updates_home or not self._keeps_views:
            return 0
        kept_nbytes = sum(view.kept_nbytes for _, view in self.pieces)
        room = read_memory_room()
        return kept_nbytes + (0 if room is None else room.free_nbytes // 2 // self.arena.comm.size)

    def _share_twice(self, layout: NodeArrays) -> PrivateView:
        """Allocate arrays of which this rank has a view of its own, too."""
        piece = self._share(layout, private=True)
        return PrivateView(piece.memory, piece.view, write_tracking(), self._budget)

    def _share_grads(
        self, partition: Partition, index: int
    ) -> tuple[dict[str, Any], list[tuple[NodeArrays, PrivateView]]]:
        """Allocate gradients in node memory, if they are there, and sums or averages."""
        if not self.residence.needs_rows:
            return {"rows": (), "own_grads": None, "sums": {}}, []
        if self.has_one_row:
            layout = plan_average_arrays(partition, [index])
            piece = self._share(layout, private=True)
            # Nothing is kept: what backward averages next is to be seen in pages once written.
            view = PrivateView(piece.memory, piece.view, write_tracking(), lambda: 0)
            row, own = (_arrays(layout, each)[GRAD_KEY] for each in (view.shared, view.view))
            sums: _Arrays = {}
            # The row is not written, and takes no memory, until averages are shown; nor are sums
            # where backward updates.
            if partition.num_nodes > 1:
                sums_layout = plan_sum_arrays(partition, self._place[0], [index])
                sums = _arrays(sums_layout, self._share(sums_layout, private=False).memory)
            return {"rows": [row], "own_grads": own, "sums": sums}, [(layout, view)]
        layout = plan_grad_arrays(partition, self._place[0], [index])
        grads = _arrays(layout, self._share(layout, private=False).memory)
        sums = {"sum": grads.pop("sum")} if "sum" in grads else {}
        rows = [*grads.values()]
        return {"rows": rows, "own_grads": rows[self._place[1]], "sums": sums}, []

    def _share(self, layout: NodeArrays, *, private: bool) -> NodeMemory:
        return self.arena.allocate(layout.nbytes, private=private)


def _arrays(layout: NodeArrays, memory: NDArray[np.uint8]) -> _Arrays:
    """Return the arrays of a region by key."""
    return {
        array.key: shaped(memory[array.slice].view(array.spec.dtype), array.spec)
        for array in layout.arrays
    }
