"""Waiting for other ranks, with a deadline and with the names of those who do not come."""

import os
import pickle
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Event
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt.comm.failure import end_job
from shardopt.comm.liveness import LivenessProbe
from shardopt.comm.shared_memory import Window
from shardopt.comm.topology import Topology
from shardopt.errors import RankFailureError

_T = TypeVar("_T")
_N = TypeVar("_N", np.int64, np.float64)
_Floats = NDArray[np.floating[Any]]

_ARRIVALS, _STEP, _LEFT, _LINE_NUMEL = 0, 1, 2, 8  # a cache line of int64 for each rank

_MESSAGE_NUMEL = 1 << 24  # below every MPI's limit on one count; each has a deadline of its own

_SPINS = 200  # some 50 us: long enough to meet a rank on a core of its own
_YIELD_FOR_S = 0.005
_NAP_S = 0.0002
_LOOK_ROUND_EVERY_S = 0.1

LOOKS = 8
"""Tests between two naps: in one, an MPI may move no more than 64 KiB of each connection."""


class Collectives:
    """Brings small things together from all ranks, and ends the job rather than wait for ever.

    Each rank notes its arrivals in a window of its node, so that whoever waits can tell who is
    missing without the help of the missing. A rank that exits notes that too: nobody waits for
    it. Ranks of other nodes are asked; see ``LivenessProbe``.

    Collective: construction, ``allreduce``, ``gather``, ``broadcast`` and ``free``.

    Args:
        topology: The ranks.
        timeout_s: Longest wait for one of them.

    Attributes:
        topology: As given.
    """

    def __init__(self, topology: Topology, timeout_s: float) -> None:
        self.topology = topology
        self._comm = topology.comm
        self._timeout_s = timeout_s
        self._node_ranks = topology.node_comm.allgather(topology.rank)
        self._window = Window(topology.node_comm, 8 * _LINE_NUMEL)
        self._lines: NDArray[np.int64] = self._window.memory.view(np.int64).reshape(-1, _LINE_NUMEL)
        self._mine = self._lines[topology.node_rank]
        self._mine[:] = 0
        self._muster = LivenessProbe(self._comm)
        self._pending: object = None
        self._met_in_step = 0  # the last step in which every rank has come to something
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
        result = np.empty_like(values)
        self._arrive(lambda: self._comm.Iallreduce(values, result, op), step, phase)
        return result

    def gather(self, value: _T, step: int, phase: str) -> list[_T]:
        """Give every rank everyone's value.

        Collective: every rank.

        Args:
            value: Anything that can be pickled.
            step: As for ``allreduce``.
            phase: Likewise.

        Raises:
            RankFailureError: As ``allreduce`` does.
        """
        own = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.empty(self._comm.size, np.int64)
        size = np.array([own.size])
        self._arrive(lambda: self._comm.Iallgather(size, sizes), step, phase)
        everyone = np.empty(sizes.sum(), np.uint8)
        parts = everyone, sizes.tolist()
        self._arrive(lambda: self._comm.Iallgatherv(own, parts), step, phase)
        return [pickle.loads(part.tobytes()) for part in np.split(everyone, np.cumsum(sizes)[:-1])]

    def send(self, array: _Floats, rank: int, step: int, phase: str) -> None:
        """Send an array, contiguous, to another rank that receives it now; raises as ``wait``."""
        for piece in _messages(array):
            self._complete(partial(self._comm.Isend, piece, rank), (step, phase), rank)

    def receive(self, array: _Floats, rank: int, step: int, phase: str) -> None:
        """Receive what another rank sends now; raises as ``wait``."""
        for piece in _messages(array):
            self._complete(partial(self._comm.Irecv, piece, rank), (step, phase), rank)

    def broadcast(self, array: _Floats, root: int, step: int, phase: str) -> None:
        """Give every rank what ``root`` has in an array, contiguous; raises as ``wait``.

        Collective: every rank.
        """
        for piece in _messages(array):
            self._arrive(partial(self._comm.Ibcast, piece, root), step, phase)

    def wait(
        self,
        test: Callable[[], bool],
        step: int,
        phase: str,
        awaited: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        """Wait for something that other ranks do.

        Args:
            test: Whether it is done; called again and again, so that it can bring it about, too.
            step: As for ``allreduce``.
            phase: Likewise.
            awaited: The ranks it depends on at this moment, if that is known.

        Raises:
            RankFailureError: As ``allreduce`` does; or MPI reports that a connection broke.
        """
        with self.translate_mpi_errors(step, phase, awaited):
            for _ in range(_SPINS):
                if test():
                    return
            self._wait(test, step, phase, awaited)

    @contextmanager
    def translate_mpi_errors(
        self, step: int, phase: str, awaited: Callable[[], Sequence[int]] = tuple
    ) -> Iterator[None]:
        """Let errors of MPI say who is lost: any call of MPI may be the first to notice.

        Args:
            step: As for ``allreduce``.
            phase: Likewise.
            awaited: As for ``wait``.

        Raises:
            RankFailureError: In the place of an error of MPI.
        """
        try:
            yield
        except MPI.Exception as error:
            self._broken.set()
            lost = self._lost()
            about = "which has lost" if lost else "when waiting for"
            names = self._name(lost or awaited() or self._missing())
            raise RankFailureError(
                f"every rank must stay in touch; got an error of MPI in step {step} ({phase}), "
                f"{about} {names or 'other ranks'}: {error}. Look for a rank or host that died."
            ) from error

    def free(self) -> None:
        """Release the window. Collective."""
        self._farewell.detach()
        del self._lines, self._mine
        self._window.free()
        self._muster.free()

    def _arrive(self, post: Callable[[], MPI.Request], step: int, phase: str) -> None:
        self._mine[_STEP] = step
        self._mine[_ARRIVALS] += 1
        self._complete(post, (step, phase))
        self._met_in_step = step

    def _complete(
        self, post: Callable[[], MPI.Request], where: tuple[int, str], *awaited: int
    ) -> None:
        with self.translate_mpi_errors(*where, lambda: awaited):
            request = post()
        self._pending = request, post  # MPI may write to its arrays even if waiting is given up
        self.wait(request.Test, *where, lambda: awaited)
        self._pending = None

    def _wait(
        self,
        test: Callable[[], bool],
        step: int,
        phase: str,
        awaited: Callable[[], Sequence[int]],
    ) -> None:
        start = look_round_at = time.monotonic()
        self._muster.begin()
        while not any(test() for _ in range(LOOKS)):
            waited = time.monotonic() - start
            if waited < _YIELD_FOR_S:
                os.sched_yield()
                continue
            time.sleep(_NAP_S)
            if start + waited > look_round_at + _LOOK_ROUND_EVERY_S:
                look_round_at = start + waited
                self._muster.look(f"step {step} ({phase})", ask=waited > self._timeout_s / 2)
                if self._has_failed(waited):
                    self._broken.set()
                    raise RankFailureError(self._describe(waited, step, phase, awaited()))

    def _behind(self) -> NDArray[np.bool_]:
        """Which ranks of this node have not come as far as this one."""
        self._window.sync()
        behind: NDArray[np.bool_] = self._lines[:, _ARRIVALS] < self._mine[_ARRIVALS]
        return behind

    def _has_failed(self, waited: float) -> bool:
        """Whether a rank of this node has left, or time is up."""
        left = self._behind() & (self._lines[:, _LEFT] != 0)
        return bool(left.any()) or waited >= self._timeout_s

    def _describe(self, waited: float, step: int, phase: str, awaited: Sequence[int]) -> str:
        answers, behind, place = self._muster.answers, self._behind(), f"step {step} ({phase})"
        seen = {rank: self._lines[i, _STEP] for i, rank in enumerate(self._node_ranks) if behind[i]}
        left = [rank for i, rank in enumerate(self._node_ranks) if rank in seen and self._left(i)]
        missing = left or self._missing(awaited)
        # Of ranks on other nodes it is known only what they must have come to.
        absent = [
            f"{self._name([rank])}, last seen in step {seen.get(rank, self._met_in_step)}"
            + (", has left the job" if rank in left else "")
            for rank in missing
        ]
        elsewhere = [
            f"{self._name([rank])} waiting in {answers[rank]}"
            for rank in awaited or seen or answers
            if answers.get(rank, place) != place
        ]
        got = "; ".join(elsewhere)
        if absent or not elsewhere:
            got = f"no sign for {waited:.1f} s of {'; '.join(absent) or 'some rank'}" + (
                f", and {got}" if got else ""
            )
        return (
            f"every rank must come to {place}; got {got}. Let all ranks make the same calls as "
            "often, look for a rank or host that died, or raise policy.timeout_s if they are only "
            "slow."
        )

    def _missing(self, awaited: Sequence[int] = ()) -> list[int]:
        """All ranks but those of this node that have come, and those that have answered."""
        behind = self._behind()
        come = {rank for i, rank in enumerate(self._node_ranks) if not behind[i]} - set(awaited)
        here = {self.topology.rank, *self._muster.answers, *come}
        return [rank for rank in range(self._comm.size) if rank not in here]

    def _lost(self) -> list[int]:
        """The ranks that MPI knows to be gone: none, where it is not told to bear that."""
        try:
            failed = self._comm.Get_failed()
            return sorted(failed.Translate_ranks(None, self._comm.group)) if failed.size else []
        except (MPI.Exception, NotImplementedError):  # it must not hide the error at hand
            return []

    def _left(self, node_rank: int) -> bool:
        return bool(self._lines[node_rank, _LEFT])

    def _name(self, ranks: Sequence[int]) -> str:
        """Write ranks, with their hosts where there are several."""
        hosts = self.topology.hosts
        several = len(set(hosts)) > 1
        return ", ".join(f"rank {r} on {hosts[r]}" if several else f"rank {r}" for r in ranks)


def _messages(array: _Floats) -> Iterator[_Floats]:
    for start in range(0, array.size, _MESSAGE_NUMEL):
        yield array[start : start + _MESSAGE_NUMEL]


def _leave(line: NDArray[np.int64], window: Window, broken: Event) -> None:
    """Tell those who would wait; a job whose ranks are out of step cannot end by itself."""
    if MPI.Is_finalized():  # by hand, and with it all windows
        return
    line[_LEFT] = 1
    window.sync()
    if broken.is_set():
        end_job(1)
