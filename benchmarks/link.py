"""What the network between nodes can do: bare TCP connections, without MPI."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mpi4py import MPI

_AT_ONCE_NBYTES = 1 << 20


class Link:
    """Connections between each two ranks, over which all send and receive at once.

    Collective: construction and every method.

    Args:
        comm: Ranks of different nodes.
        nbytes: What each sends to each of the others.
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
        self._pool = ThreadPoolExecutor(2 * len(self._peers))

    def transfer(self) -> None:
        """Send to all others, and receive as much from each of them."""
        sent = [self._pool.submit(peer.sendall, self._message) for peer in self._peers]
        for received in [self._pool.submit(self._receive, peer) for peer in self._peers]:
            received.result()
        for each in sent:
            each.result()

    def close(self) -> None:
        """End the connections."""
        self._pool.shutdown()
        for peer in self._peers:
            peer.close()

    def _receive(self, peer: socket.socket) -> None:
        buffer, left = memoryview(bytearray(_AT_ONCE_NBYTES)), len(self._message)
        while left:
            received = peer.recv_into(buffer[: min(left, _AT_ONCE_NBYTES)])
            if not received:
                raise ConnectionError("a connection between nodes must stay; it was closed.")
            left -= received


def sent_nbytes() -> int:
    """Bytes that all network interfaces of this host but the loopback have sent so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    counts = {name.strip(): rest.split() for name, rest in (line.split(":") for line in lines)}
    return sum(int(fields[8]) for name, fields in counts.items() if name != "lo")
