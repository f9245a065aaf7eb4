"""Deadlines for the steps of an examination: a rank that waits too long reports why and aborts."""

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
_ARRIVAL = 1  # the tag of a rank's message that it has arrived


class Watch:
    """A deadline for every step that the ranks take together.

    Args:
        timeout_s: Longest time for a step, in seconds.
        rank: This rank. Rank 0 is the first to give up, since it knows which ranks are missing.

    Attributes:
        hosts: The ranks' host names for messages, as far as they are known.
    """

    def __init__(self, timeout_s: float, rank: int) -> None:
        self._timeout_s = timeout_s
        self._patience_s = timeout_s + (_GRACE_S if rank else 0.0)
        self._missing: list[int] = []
        self.hosts: Mapping[int, str] = {}

    @contextmanager
    def over(self, step: str, patience: float = 1.0) -> Iterator[None]:
        """Set a deadline for a step."""
        extra_s = (patience - 1) * self._timeout_s
        with overdue(self._patience_s + extra_s, lambda: self._give_up(step, patience)):
            yield

    @contextmanager
    def from_outside(self, step: str) -> Iterator[None]:
        """Set a deadline for a step that does not release the interpreter, such as MPI's start.

        A child process keeps the time and kills this one, so the job ends without MPI's abort.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(writer)
            is_over = select([reader], [], [], self._patience_s)[0]  # once the parent closes it
            if not is_over:
                self._report(step)
                os.kill(os.getppid(), SIGKILL)
            os._exit(0)
        os.close(reader)
        try:
            yield
        finally:
            os.close(writer)
            os.waitpid(child, 0)

    @contextmanager
    def together(self, step: str, comm: MPI.Intracomm, patience: float = 1.0) -> Iterator[None]:
        """Wait for all ranks and then begin a step, with one deadline for both. Collective.

        Args:
            step: What it is, for messages.
            comm: The ranks.
            patience: The factor on the time that it may take.
        """
        with self.over(step, patience):
            self.meet(comm)
            yield

    def meet(self, comm: MPI.Intracomm) -> None:
        """Wait for all ranks, asleep, while rank 0 keeps track of those that are missing.

        Collective: every rank of ``comm``.
        """
        messages = np.zeros((comm.size, 1), np.int8)
        if comm.rank:
            arrivals = {0: comm.Isend(messages[0], 0, _ARRIVAL)}
        else:
            others = range(1, comm.size)
            arrivals = {rank: comm.Irecv(messages[rank], rank, _ARRIVAL) for rank in others}
        barrier = comm.Ibarrier()
        while not barrier.Test():
            if comm.rank == 0:
                self._missing = [rank for rank, request in arrivals.items() if not request.Test()]
            time.sleep(_NAP_S)  # leaves the cores to ranks that still work
        MPI.Request.Waitall(list(arrivals.values()))
        self._missing = []

    def _give_up(self, step: str, patience: float) -> None:
        self._report(step, patience)
        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            end_job(1)
        os._exit(1)

    def _report(self, step: str, patience: float = 1.0) -> None:
        limit = f"within {patience * self._timeout_s:g} s"
        if self._missing:
            names = ", ".join(
                f"rank {rank} on {self.hosts[rank]}" if rank in self.hosts else f"rank {rank}"
                for rank in self._missing
            )
            text = (
                f"{names} did not reach {step} {limit}. Check what blocks it there, or raise "
                "--timeout."
            )
        else:
            text = (
                f"{step} did not end {limit}. Check whether all nodes can reach each other over "
                "the network and whether other jobs keep their cores busy, or raise --timeout."
            )
        print(f"shardopt doctor: {text}", file=sys.stderr, flush=True)
