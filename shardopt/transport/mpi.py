"""The transport over MPI."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from shardopt._typing import Array
from shardopt.comm.topology import Topology
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.traffic import Traffic

_BROADCAST_NBYTES = 1 << 28  # below every MPI's limit on one count


class MpiMessage:
    """A request of MPI."""

    __slots__ = ("_request",)

    def __init__(self, request: MPI.Request) -> None:
        self._request = request

    def is_done(self) -> bool:
        """Whether the request is complete; makes progress.

        Raises:
            MPI.Exception: A connection broke.
        """
        return self._request.Test()


class MpiTransport:
    """Sends whole chunks within a lane; see ``Transport``.

    Args:
        topology: The ranks.
    """

    def __init__(self, topology: Topology) -> None:
        self.node = topology.node
        self.ranks = topology.lane_ranks
        self.others = [(self.node + i) % topology.num_nodes for i in range(1, topology.num_nodes)]
        self._comm = topology.lane_comm
        self._chunks: dict[int, MPI.Datatype] = {}
        self.sent = Traffic(0, 0)

    def reset(self) -> None:
        """See ``Transport.reset``."""
        self.sent = Traffic(0, 0)

    def post_send(self, array: Array, node: int, tag: int) -> MpiMessage:
        """See ``Transport.post_send``."""
        self.sent = Traffic(self.sent.nbytes + array.nbytes, self.sent.messages + 1)
        return MpiMessage(self._comm.Isend(self._buffer(array), node, tag))

    def post_receive(self, array: Array, node: int, tag: int) -> MpiMessage:
        """See ``Transport.post_receive``."""
        return MpiMessage(self._comm.Irecv(self._buffer(array), node, tag))

    def post_broadcast(self, array: Array, root: int) -> Sequence[MpiMessage]:
        """See ``Transport.post_broadcast``."""
        memory = array.reshape(-1).view(np.uint8)
        pieces = [
            memory[start : start + _BROADCAST_NBYTES]
            for start in range(0, memory.size, _BROADCAST_NBYTES)
        ]
        return [MpiMessage(self._comm.Ibcast(piece, root)) for piece in pieces]

    def close(self) -> None:
        """See ``Transport.close``."""
        for chunk in self._chunks.values():
            chunk.Free()
        self._chunks.clear()

    def _buffer(self, array: Array) -> Any:
        """Count in chunks: a count of bytes would not fit into 31 bits for a large bucket."""
        nbytes = CHUNK_NUMEL * array.itemsize
        if nbytes not in self._chunks:
            self._chunks[nbytes] = MPI.BYTE.Create_contiguous(nbytes).Commit()
        return [array.view(np.uint8), array.nbytes // nbytes, self._chunks[nbytes]]
