"""Latency and bandwidth of the links between ranks: by MPI, and by bare TCP connections."""

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from mpi4py import MPI

_WARM_UP = 8  # connections are made at the first message
_MIN_NBYTES, _MAX_NBYTES, _MESSAGE_S = 64 << 10, 16 << 20, 0.01  # of a message
_IN_FLIGHT = 3  # messages each way, so that none waits for the previous one to arrive
_MAX_IN_FLIGHT = 16  # one for each receiver, so that a slow one does not hold up the others
_RECEIVE_NBYTES = 1 << 20  # taken from a TCP connection at once


@dataclass(frozen=True, slots=True)
class Pair:
    """Two ranks that measure the link between them, as seen by one of the two.

    Attributes:
        comm: A communicator with both ranks in it.
        peer: The other rank.
        leads: Whether this rank watches the clock; true on exactly one of the two.
    """

    comm: MPI.Intracomm
    peer: int
    leads: bool


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """The speed of a link between two ranks.

    Attributes:
        latency_s: Seconds for a message of 8 bytes, one way.
        nbytes_per_s: Bytes/s each way, in both directions at once.
    """

    latency_s: float
    nbytes_per_s: float

    def better_of(self, other: "LinkSpeed") -> "LinkSpeed":
        """Return the shorter latency and the higher bandwidth of two measurements."""
        return LinkSpeed(
            min(self.latency_s, other.latency_s), max(self.nbytes_per_s, other.nbytes_per_s)
        )


@dataclass(frozen=True, slots=True)
class Messages:
    """The messages of one measurement.

    Attributes:
        nbytes: Size of each message.
        count: Number of messages that a rank sends.
    """

    nbytes: int
    count: int


# -- by MPI: two ranks -----------------------------------------------------------------------------


def measure_link(pair: Pair, budget_s: float) -> LinkSpeed:
    """Measure latency and bandwidth. Collective: both ranks of the pair.

    Args:
        pair: The two ranks.
        budget_s: Seconds that it may take, approximately; the leading rank's value counts.
    """
    return LinkSpeed(measure_latency(pair, 0.2 * budget_s), measure_both_ways(pair, 0.8 * budget_s))


def measure_latency(pair: Pair, budget_s: float) -> float:
    """Play ping-pong with 8 bytes, and return the seconds of one way.

    Collective: both ranks of the pair.
    """
    comm, peer = pair.comm, pair.peer
    is_last = np.zeros(1, np.int64)
    start_s, count = time.perf_counter(), -_WARM_UP
    while not is_last[0]:
        if count == 0:
            start_s = time.perf_counter()
        if pair.leads:
            is_last[0] = count > 0 and time.perf_counter() - start_s > budget_s
            comm.Send(is_last, peer)
            comm.Recv(is_last, peer)
        else:
            comm.Recv(is_last, peer)
            comm.Send(is_last, peer)
        count += 1
    return (time.perf_counter() - start_s) / (2 * count)


def measure_both_ways(pair: Pair, budget_s: float) -> float:
    """Send large messages in both directions at once, and return the bytes/s of each direction.

    Collective: both ranks of the pair.
    """
    comm, peer = pair.comm, pair.peer
    messages = plan_messages(_estimate_rate(pair, 0.1 * budget_s), 0.9 * budget_s)
    plan = np.array([messages.nbytes, messages.count], np.int64)
    if pair.leads:
        comm.Send(plan, peer)
    else:
        comm.Recv(plan, peer)
    sent, received = np.zeros(1, np.uint8), np.zeros(1, np.uint8)
    meet = partial(comm.Sendrecv, sent, peer, recvbuf=received, source=peer)
    return _measure_stream(comm, [(peer, peer)], Messages(int(plan[0]), int(plan[1])), meet)


def _estimate_rate(pair: Pair, budget_s: float) -> float:
    """Exchange small messages until time is up, and return the bytes/s of each direction."""
    sent, received = np.zeros(_MIN_NBYTES, np.uint8), np.zeros(_MIN_NBYTES, np.uint8)
    leader = sent if pair.leads else received  # its first byte tells both whether it is the last
    start_s, count = time.perf_counter(), 0
    while not leader[0]:
        sent[0] = pair.leads and time.perf_counter() - start_s > budget_s
        pair.comm.Sendrecv(sent, pair.peer, recvbuf=received, source=pair.peer)
        count += 1
    return _MIN_NBYTES * count / (time.perf_counter() - start_s)


def plan_messages(nbytes_per_s: float, budget_s: float) -> Messages:
    """Choose size and number of messages that a link of this bandwidth takes ``budget_s`` for."""
    nbytes = _MIN_NBYTES
    while nbytes < min(nbytes_per_s * _MESSAGE_S, _MAX_NBYTES):
        nbytes *= 2
    return Messages(nbytes, max(_IN_FLIGHT, int(nbytes_per_s * budget_s / nbytes)))


# -- by MPI: many ranks ----------------------------------------------------------------------------


def measure_all_gather(comm: MPI.Intracomm, messages: Messages) -> float:
    """Send from every rank to every other at once, the traffic of an all-gather over a lane.

    Collective: every rank of ``comm``.

    Args:
        comm: The ranks, for example one per node; at least two.
        messages: What each rank sends, the others taking turns as receivers.

    Returns:
        Bytes/s that this rank sent.
    """
    shifts = range(1, comm.size)
    peers = [((comm.rank + shift) % comm.size, (comm.rank - shift) % comm.size) for shift in shifts]
    return _measure_stream(comm, peers, messages, comm.Barrier)


def _measure_stream(
    comm: MPI.Intracomm,
    peers: Sequence[tuple[int, int]],
    messages: Messages,
    meet: Callable[[], None],
) -> float:
    """Send and receive messages, several of them in flight at any time.

    Args:
        comm: The ranks.
        peers: (destination, source) of the first message and the next, over and over.
        messages: Their size and number.
        meet: Returns once all who take part are here, so that the time of the slowest counts.

    Returns:
        Bytes/s sent.
    """
    sent = np.zeros(messages.nbytes, np.uint8)
    in_flight = min(max(_IN_FLIGHT, len(peers)), _MAX_IN_FLIGHT)
    received = np.zeros((in_flight, messages.nbytes), np.uint8)
    requests: deque[list[MPI.Request]] = deque()
    meet()
    start_s = time.perf_counter()
    for turn in range(messages.count):
        destination, source = peers[turn % len(peers)]
        if len(requests) == in_flight:
            MPI.Request.Waitall(requests.popleft())
        receive = comm.Irecv(received[turn % in_flight], source)
        requests.append([receive, comm.Isend(sent, destination)])
    for pair in requests:
        MPI.Request.Waitall(pair)
    meet()
    return messages.nbytes * messages.count / (time.perf_counter() - start_s)


# -- by TCP ----------------------------------------------------------------------------------------


class TcpLink:
    """Bare TCP connections between all ranks: what the network can do without MPI.

    Collective: construction and every method.

    Args:
        comm: Ranks of different nodes.
        nbytes: Bytes that each rank sends to each of the others.

    Attributes:
        nbytes: Bytes that one transfer sends from this rank.
    """

    def __init__(self, comm: MPI.Intracomm, nbytes: int) -> None:
        self._message = bytes(nbytes)
        self._peers: list[socket.socket] = []
        with socket.create_server((socket.gethostname(), 0), backlog=comm.size) as server:
            addresses = comm.allgather(server.getsockname())
            for address in addresses[: comm.rank]:
                self._peers.append(socket.create_connection(address))
            for _ in addresses[comm.rank + 1 :]:
                self._peers.append(server.accept()[0])
        self.nbytes = nbytes * len(self._peers)
        self._pool = ThreadPoolExecutor(max(1, 2 * len(self._peers)))

    def transfer(self) -> None:
        """Send to all other ranks while receiving as much from each of them."""
        sent = [self._pool.submit(peer.sendall, self._message) for peer in self._peers]
        for received in [self._pool.submit(self._receive, peer) for peer in self._peers]:
            received.result()
        for each in sent:
            each.result()

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown()
        for peer in self._peers:
            peer.close()

    def _receive(self, peer: socket.socket) -> None:
        buffer, missing = memoryview(bytearray(_RECEIVE_NBYTES)), len(self._message)
        while missing:
            received = peer.recv_into(buffer[: min(missing, _RECEIVE_NBYTES)])
            if not received:
                raise ConnectionError(
                    "a rank closed its TCP connection in the middle of a transfer. Check whether "
                    "its process or host died."
                )
            missing -= received


def sent_nbytes() -> int:
    """Return the bytes that this host's network interfaces, the loopback aside, have sent so far.

    Linux only.
    """
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    counts = {name.strip(): rest.split() for name, rest in (line.split(":") for line in lines)}
    return sum(int(fields[8]) for name, fields in counts.items() if name != "lo")
