"""Ctrl-C in a job of many ranks."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from mpi4py import MPI

if TYPE_CHECKING:
    from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""On Ctrl-C MPICH's mpirun hands SIGINT on to the ranks, Open MPI's sends them SIGTERM."""


class Interruption:
    """Notes that a signal came, so that all ranks can stop after the same step.

    A rank that stopped on its own would leave the others waiting in their next collective.

    Attributes:
        exit_code: What the program should return: 0, or 128 + the signal, as shells count.
    """

    def __init__(self) -> None:
        self.exit_code = 0

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def share(self, comm: MPI.Intracomm) -> None:
        """Give all ranks the highest exit code of any. Collective."""
        self.exit_code = comm.allreduce(self.exit_code, MPI.MAX)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = 128 + number
