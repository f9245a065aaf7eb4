"""No step waits for ever: whoever waits too long says for what and for whom, and ends the job."""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from select import select
from signal import SIGKILL

import numpy as np
from mpi4py import MPI

from shardopt.comm.failure import end_job
from shardopt.comm.waiting import overdue

_GRACE_S = 2.0
_NAP_S = 0.0005
_SIGN = 1  # the tag of a rank's sign of life


class Watch:
    """Times the steps that ranks take together.

    Args:
        timeout_s: Longest time for a step.
        rank: This rank; rank 0, which knows who is missing, is the first to give up.

    Attributes:
        hosts: Names of the ranks' hosts, as far as they are known, for messages.
    """

    def __init__(self, timeout_s: float, rank: int) -> None:
        self._timeout_s = timeout_s
        self._patience_s = timeout_s + (_GRACE_S if rank else 0.0)
        self._missing: list[int] = []
        self.hosts: Mapping[int, str] = {}

    @contextmanager
    def over(self, step: str) -> Iterator[None]:
        """Watch over a step."""
        with overdue(self._patience_s, lambda: self._give_up(step)):
            yield

    @contextmanager
    def from_outside(self, step: str) -> Iterator[None]:
        """Watch over a step that keeps the interpreter to itself, as the start of MPI does.

        A process of its own watches, and kills this one; so it cannot end the job in good form.
        """
        end, mine = os.pipe()
        child = os.fork()
        if not child:
            os.close(mine)
            if not select([end], [], [], self._patience_s)[0]:
                self._tell(step)
                os.kill(os.getppid(), SIGKILL)
            os._exit(0)
        os.close(end)
        try:
            yield
        finally:
            os.close(mine)
            os.waitpid(child, 0)

    @contextmanager
    def together(self, step: str, comm: MPI.Intracomm) -> Iterator[None]:
        """Wait for all ranks, and watch over the step that begins then. Collective."""
        with self.over(step):
            self.meet(comm)
            yield

    def meet(self, comm: MPI.Intracomm) -> None:
        """Wait for all ranks, leave the cores to those who still work, and note who they are."""
        signs = np.zeros((comm.size, 1), np.int8)
        if comm.rank:
            arrivals = {0: comm.Isend(signs[0], 0, _SIGN)}
        else:
            others = range(1, comm.size)
            arrivals = {rank: comm.Irecv(signs[rank], rank, _SIGN) for rank in others}
        barrier = comm.Ibarrier()
        while not barrier.Test():
            if comm.rank == 0:
                self._missing = [rank for rank, request in arrivals.items() if not request.Test()]
            time.sleep(_NAP_S)
        MPI.Request.Waitall(list(arrivals.values()))
        self._missing = []

    def _give_up(self, step: str) -> None:
        self._tell(step)
        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            end_job(1)
        os._exit(1)

    def _tell(self, step: str) -> None:
        if self._missing:
            names = ", ".join(
                f"{rank} on {self.hosts[rank]}" if rank in self.hosts else str(rank)
                for rank in self._missing
            )
            text = (
                f"every rank must come to {step} within {self._timeout_s:g} s; got no sign of rank "
                f"{names}. See what holds it up there, or raise --timeout."
            )
        else:
            text = (
                f"{step} must end within {self._timeout_s:g} s; got no end of it. See whether all "
                "nodes reach each other by the network, or raise --timeout."
            )
        print(f"shardopt doctor: {text}", file=sys.stderr, flush=True)
