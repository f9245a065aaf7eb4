"""The ranks of one lane, one a node: what they send each other.

[Note: messages of a lane]
A bucket's sums travel from each rank of a lane straight to the owners of its shards, and updated
shards from their owner to all others. So each rank sends (M-1)/M of its lane part each way, which
is the least there is, and every rank knows at any time whom it waits for. Messages between two
ranks are posted in the same order on both sides, that of buckets, and MPI keeps it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt.comm.topology import Topology
from shardopt.layout.partition import CHUNK_NUMEL

Array = NDArray[Any]

_BROADCAST_NBYTES = 1 << 28  # below every MPI's limit on one count


class Transfer:
    """Messages on their way to and from other nodes.

    Args:
        sends: Requests by node.
        receives: Likewise.

    Attributes:
        sends: Those that are not over; more may be added.
    """

    def __init__(
        self, sends: Sequence[tuple[int, MPI.Request]], receives: Sequence[tuple[int, MPI.Request]]
    ) -> None:
        self.sends = list(sends)
        self._receives = list(receives)

    def has_arrived(self) -> bool:
        """Whether all that is received is there; makes progress."""
        self._receives = _still_under_way(self._receives)
        return not self._receives

    def is_over(self) -> bool:
        """Whether all that is sent is out of its buffers as well; makes progress."""
        self.sends = _still_under_way(self.sends)
        return self.has_arrived() and not self.sends

    @property
    def awaited_nodes(self) -> list[int]:
        """The nodes whose part is missing."""
        return sorted({node for node, _ in self._receives} or {node for node, _ in self.sends})


class Lane:
    """Sends and receives whole chunks within a lane; see [Note: messages of a lane].

    Args:
        topology: The ranks.

    Attributes:
        node: This rank in the lane.
        num_nodes: The ranks in it.
        sent_nbytes: Since the last ``reset``.
        sent_messages: Likewise.
    """

    def __init__(self, topology: Topology) -> None:
        self._comm = topology.lane_comm
        self.node = topology.node
        self.num_nodes = topology.num_nodes
        self.ranks = topology.lane_ranks
        self._chunks: dict[int, MPI.Datatype] = {}
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.sent_nbytes = 0
        self.sent_messages = 0

    @property
    def others(self) -> list[int]:
        """The other nodes, beginning behind this one, so that not all send to one at a time."""
        return [(self.node + i) % self.num_nodes for i in range(1, self.num_nodes)]

    def receive(self, parts: Iterable[tuple[int, Array]], tag: int) -> list[tuple[int, Any]]:
        """Post receives.

        Args:
            parts: Nodes, and arrays of whole chunks that their messages are to fill.
            tag: What kind of message.
        """
        return [
            (node, self._comm.Irecv(self._buffer(array), node, tag))
            for node, array in parts
            if array.size
        ]

    def send(self, array: Array, node: int, tag: int) -> list[tuple[int, Any]]:
        """Send whole chunks, if any, to another node; they must stay as they are."""
        if not array.size:
            return []
        self.sent_nbytes += array.nbytes
        self.sent_messages += 1
        return [(node, self._comm.Isend(self._buffer(array), node, tag))]

    def broadcast(self, array: Array, root: int) -> list[MPI.Request]:
        """Start to bring an array, contiguous, from node ``root`` to the others. Collective."""
        memory = array.reshape(-1).view(np.uint8)
        cuts = range(0, memory.size, _BROADCAST_NBYTES)
        return [self._comm.Ibcast(memory[i : i + _BROADCAST_NBYTES], root) for i in cuts]

    def free(self) -> None:
        """Release what MPI keeps."""
        for chunk in self._chunks.values():
            chunk.Free()
        self._chunks.clear()

    def _buffer(self, array: Array) -> Any:
        """Count in chunks: a count of bytes would not fit into 31 bits for a large bucket."""
        nbytes = CHUNK_NUMEL * array.itemsize
        if nbytes not in self._chunks:
            self._chunks[nbytes] = MPI.BYTE.Create_contiguous(nbytes).Commit()
        return [array.view(np.uint8), array.nbytes // nbytes, self._chunks[nbytes]]


def _still_under_way(requests: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    return [(node, request) for node, request in requests if not request.Test()]
