"""Waiting for other ranks, with a deadline and with the names of those who do not come."""

import os
import time
import weakref
from threading import Event
from typing import TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt.comm.abort import end_job
from shardopt.comm.topology import Topology
from shardopt.comm.window import Window
from shardopt.errors import RankFailureError

_N = TypeVar("_N", np.int64, np.float64)

_ARRIVALS, _STEP, _LEFT, _LINE_NUMEL = 0, 1, 2, 8  # a cache line of int64 for each rank

_SPINS = 200  # some 50 us: long enough to meet a rank on a core of its own
_YIELD_FOR_S = 0.005
_NAP_S = 0.0002
_LOOK_ROUND_EVERY_S = 0.1


class RollCall:
    """Allreduces small arrays over all ranks, and ends the job rather than wait for ever.

    Each rank notes its arrivals in a window of its node, so that whoever waits can tell who is
    missing without the help of the missing. A rank that exits notes that too: nobody waits for
    it.

    Collective: construction and ``free``.
    """

    def __init__(self, topology: Topology, timeout_s: float) -> None:
        self._comm = topology.comm
        self._timeout_s = timeout_s
        self._node_ranks = topology.node_comm.allgather(topology.rank)
        self._window = Window(topology.node_comm, 8 * _LINE_NUMEL)
        self._lines: NDArray[np.int64] = self._window.memory.view(np.int64).reshape(-1, _LINE_NUMEL)
        self._mine = self._lines[topology.node_rank]
        self._mine[:] = 0
        self._pending: object = None
        self._broken = Event()
        self._farewell = weakref.finalize(self, _leave, self._mine, self._window, self._broken)
        self._comm.Barrier()

    def allreduce(self, values: NDArray[_N], op: MPI.Op, step: int, phase: str) -> NDArray[_N]:
        """Reduce a few numbers over all ranks; also a barrier, as each result needs every rank.

        Collective: every rank, with the same shape of ``values``.

        Args:
            values: [n], left as they are.
            op: For example ``MPI.MAX``.
            step: What ``step()`` this belongs to, for messages.
            phase: What is being done, for messages.

        Raises:
            RankFailureError: Some rank has left the job, or has not come within the time allowed.
                The communicator is of no use after that.
        """
        self._mine[_STEP] = step
        self._mine[_ARRIVALS] += 1
        result = np.empty_like(values)
        request = self._comm.Iallreduce(values, result, op)
        for _ in range(_SPINS):
            if request.Test():
                return result
        self._pending = request, values, result  # MPI may write there even if waiting is given up
        self._wait(request, step, phase)
        self._pending = None
        return result

    def free(self) -> None:
        """Release the window. Collective."""
        self._farewell.detach()
        del self._lines, self._mine
        self._window.free()

    def _wait(self, request: MPI.Request, step: int, phase: str) -> None:
        start = look_round_at = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - start
            if waited < _YIELD_FOR_S:
                os.sched_yield()
                continue
            time.sleep(_NAP_S)
            if start + waited > look_round_at + _LOOK_ROUND_EVERY_S:
                look_round_at = start + waited
                self._look_round(waited, step, phase)

    def _look_round(self, waited: float, step: int, phase: str) -> None:
        """Raise when a rank has left, or when time is up."""
        self._window.sync()
        behind = self._lines[:, _ARRIVALS] < self._mine[_ARRIVALS]
        left = behind & (self._lines[:, _LEFT] != 0)
        if not left.any() and waited < self._timeout_s:
            return
        self._broken.set()
        missing = left if left.any() else behind
        names = "; ".join(
            f"rank {self._node_ranks[i]}, last seen in step {self._lines[i, _STEP]}"
            + (", has left the job" if left[i] else "")
            for i in np.flatnonzero(missing)
        )
        raise RankFailureError(
            f"every rank must come to step {step} ({phase}); got no sign for {waited:.1f} s of "
            f"{names or 'some rank of another node'}. Let all ranks make the same calls as "
            "often, or raise policy.timeout_s if they are only slow."
        )


def _leave(line: NDArray[np.int64], window: Window, broken: Event) -> None:
    """Tell those who would wait; a job whose ranks are out of step cannot end by itself."""
    if MPI.Is_finalized():  # by hand, and with it all windows
        return
    line[_LEFT] = 1
    window.sync()
    if broken.is_set():
        end_job(1)
