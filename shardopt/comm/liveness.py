"""Who is here: ranks that wait tell each other so, across nodes and without the missing."""

from typing import Any

from mpi4py import MPI


class LivenessProbe:
    """Asks all ranks for a sign and collects it from those that are waiting, too.

    A rank looks after its mail only while it waits. Whoever does not answer computes, hangs or is
    gone; a collective could not tell which rank that is, as it needs every one of them.

    Collective: construction and ``free``.

    Args:
        comm: All ranks.

    Attributes:
        answers: What the ranks that have answered wait for.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm.Dup()
        self._number = 0  # of questions asked: an answer to an old one tells nothing
        self._asked = False
        self._sends: list[Any] = []  # kept, as MPI reads from them
        self.answers: dict[int, str] = {}

    def begin(self) -> None:
        """Begin a wait, about which nobody has been asked yet."""
        self.answers = {}
        self._asked = False

    def look(self, waits_for: str, *, ask: bool) -> None:
        """Read the mail and answer it.

        Args:
            waits_for: What this rank waits for.
            ask: Ask the others, if that has not been done since ``begin``.
        """
        status = MPI.Status()
        while self._comm.iprobe(status=status):
            rank = status.source
            number, text = self._comm.recv(source=rank)
            if text is None:
                self._send((number, waits_for), rank)
            elif number == self._number and self._asked:
                self.answers[rank] = text
        if ask and not self._asked:
            self._asked = True
            self._number += 1
            for rank in range(self._comm.size):
                if rank != self._comm.rank:
                    self._send((self._number, None), rank)

    def free(self) -> None:
        """Release the communicator. Collective."""
        self._comm.Free()

    def _send(self, message: tuple[int, str | None], rank: int) -> None:
        self._sends = [request for request in self._sends if not request.test()[0]]
        self._sends.append(self._comm.isend(message, rank))
