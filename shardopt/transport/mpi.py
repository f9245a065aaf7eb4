"""The transport over MPI."""

import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from mpi4py import MPI

from shardopt._typing import Array
from shardopt.comm.topology import Topology
from shardopt.errors import ShardoptError
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.traffic import Traffic

NUM_KINDS = 4
"""Kinds of messages; larger than every ``tag`` that a ``Transport`` is given."""

_NOTES = 3  # the tag of notes

_BROADCAST_NBYTES = 1 << 28  # below every MPI's limit on one count


class MpiMessage:
    """A request of MPI."""

    __slots__ = ("_is_done", "_request", "is_empty")

    def __init__(self, request: MPI.Request) -> None:
        self._request, self._is_done = request, False
        self.is_empty = False

    def is_done(self) -> bool:
        """Whether the request is complete; makes progress.

        Raises:
            MPI.Exception: A connection broke.
        """
        if not self._is_done:
            status = MPI.Status()
            self._is_done = self._request.Test(status)
            self.is_empty = self._is_done and status.Get_count(MPI.BYTE) == 0
        return self._is_done


class MpiTransport:
    """Sends whole chunks within a lane; see ``Transport``.

    Optimizers share the lane's communicator, and their progress threads send in any order, so that
    tags tell their messages apart. One thread may post parameters while another posts gradients.

    Args:
        topology: The ranks.
        number: That of the optimizer; see [Note: optimizers share communicators].

    Raises:
        ShardoptError: MPI has no more tags for this communicator.
    """

    def __init__(self, topology: Topology, number: int) -> None:
        self.node = topology.node
        self.ranks = topology.lane_ranks
        self.others = [(self.node + i) % topology.num_nodes for i in range(1, topology.num_nodes)]
        self._comm = topology.lane_comm
        self._first_tag = _first_tag(number)
        self._lock = threading.Lock()  # of what follows
        self._chunks: dict[int, MPI.Datatype] = {}
        self.sent = Traffic(0, 0)

    def reset(self) -> None:
        """See ``Transport.reset``."""
        self.sent = Traffic(0, 0)

    def post_send(self, array: Array, node: int, tag: int) -> MpiMessage:
        """See ``Transport.post_send``."""
        with self._lock:
            self.sent = Traffic(self.sent.nbytes + array.nbytes, self.sent.messages + 1)
        return MpiMessage(self._comm.Isend(self._buffer(array), node, self._first_tag + tag))

    def post_receive(self, array: Array, node: int, tag: int) -> MpiMessage:
        """See ``Transport.post_receive``."""
        return MpiMessage(self._comm.Irecv(self._buffer(array), node, self._first_tag + tag))

    def post_note(self, note: Array, node: int) -> MpiMessage:
        """See ``Transport.post_note``."""
        return MpiMessage(self._comm.Isend([note, MPI.BYTE], node, self._first_tag + _NOTES))

    def post_receive_note(self, note: Array, node: int) -> MpiMessage:
        """See ``Transport.post_receive_note``."""
        return MpiMessage(self._comm.Irecv([note, MPI.BYTE], node, self._first_tag + _NOTES))

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
        with self._lock:
            if nbytes not in self._chunks:
                self._chunks[nbytes] = MPI.BYTE.Create_contiguous(nbytes).Commit()
        return [array.view(np.uint8), array.nbytes // nbytes, self._chunks[nbytes]]


def _first_tag(number: int) -> int:
    """Return the first of the tags of an optimizer.

    Raises:
        ShardoptError: It is larger than MPI allows.
    """
    highest = cast("int", MPI.COMM_WORLD.Get_attr(MPI.TAG_UB))
    if (number + 1) * NUM_KINDS - 1 > highest:
        raise ShardoptError(
            f"a communicator must have at most {(highest + 1) // NUM_KINDS - 1:,} optimizers in "
            f"the course of a job, as MPI's tags end at {highest:,} (MPI_TAG_UB); got number "
            f"{number:,}. Pass the next ones another communicator: comm=comm.Dup()."
        )
    return number * NUM_KINDS
