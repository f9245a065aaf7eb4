"""The parameters in every node's shared memory, and how new values get there."""

from collections.abc import Mapping, Sequence

from shardopt._typing import FloatArray
from shardopt.core.parts import Parts
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.params.binding import Binding


class SharedParams:
    """Brings values that did not come from an update to all nodes.

    Args:
        parts: The optimizer's.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def initialize(self, bindings: Sequence[Binding], step: int) -> None:
        """Copy rank 0's values of new parameters to every node, and bind the parameters.

        Collective: every rank.
        """
        parts = self._parts
        parts.meet(step, "allocate")  # every owner has touched its pages
        if parts.topology.rank == 0:
            for binding in bindings:
                binding.fill()
        parts.meet(step, "fill")
        for buffers in parts.memory.buffers:
            lane = buffers.local(buffers.region).cut(
                parts.topology.node_rank, parts.topology.node_size, CHUNK_NUMEL
            )
            parts.sync.broadcast(buffers.params[lane.slice], parts.topology.places[0][0])
        parts.meet(step, "publish")
        for binding in bindings:
            binding.bind()

    def adopt_writes(self, replaced: Mapping[int, FloatArray], everyones: Sequence[int]) -> int:
        """Take over arrays that users put in the place of parameters.

        If several ranks have replaced a parameter, the lowest rank's value wins.

        Collective: every rank. Other ranks may read the values after the next ``Parts.meet``.

        Args:
            replaced: This rank's, by parameter index.
            everyones: For each rank a bit mask of the parameters it has replaced; empty if no rank
                has.

        Returns:
            Bytes that this rank copied.
        """
        parts = self._parts
        winners = _lowest_ranks(everyones)
        mine = {index for index, rank in winners.items() if rank == parts.topology.rank}
        copied_nbytes = parts.registry.adopt(replaced, mine)
        for index, rank in sorted(winners.items()):
            node, node_rank = parts.topology.places[rank]
            if node_rank == parts.topology.node_rank:
                parts.sync.broadcast(parts.registry.bindings[index].data, node)
        return copied_nbytes

    def publish_all(self, step: int) -> None:
        """Send what each owner has written into its shards to all nodes.

        Collective: every rank.

        Args:
            step: The last one.
        """
        parts = self._parts
        parts.overlap.settle(step)
        parts.sync.publish_all()
        parts.meet(step, "load")
        parts.registry.rebind()
        parts.start_step(step + 1)


def _lowest_ranks(masks: Sequence[int]) -> dict[int, int]:
    """Return the lowest rank whose mask has a bit, by the number of the bit."""
    lowest: dict[int, int] = {}
    for rank, mask in enumerate(masks):
        for index in range(mask.bit_length()):
            if mask >> index & 1:
                lowest.setdefault(index, rank)
    return lowest
