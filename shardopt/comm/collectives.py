"""Small collectives with a deadline, and waits for anything else that other ranks do."""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt.comm.exit_hook import ExitHook, mpi_is_usable
from shardopt.comm.failure import FailurePolicy
from shardopt.comm.group import RankGroup
from shardopt.comm.liveness import Where
from shardopt.comm.waiting import wait_until
from shardopt.errors import ClosedError, RankFailureError, ThreadError
from shardopt.policy import ShardPolicy
from shardopt.trace import OFF, Trace

_T = TypeVar("_T")
_N = TypeVar("_N", np.int64, np.float64)
_Floats = NDArray[np.floating[Any]]

_MESSAGE_NUMEL = 1 << 24  # below every MPI's limit on one count; each has a deadline of its own


class _ElsewhereError(Exception):
    """Some rank waits for all others in another call."""


class Collectives:
    """Collectives with a deadline: on timeout they say which ranks are missing.

    Each rank notes in its node's memory which collective it has entered, so the ranks that wait
    can tell who is missing without the help of the missing. A rank that exits notes that too, and
    nobody waits for it any longer. Ranks of other nodes are asked; see ``FailureDetector``.

    Collective: construction, ``allreduce``, ``allgather``, ``bcast`` and ``free``.

    Args:
        group: The ranks, with communicators that several optimizers share.
        policy: Has the longest wait for one of them, which may be changed at any time.
        failure: What to do when ranks are missing or lost.
        number: That of the optimizer; see [Note: optimizers share communicators].
        trace: Shows waits.

    Attributes:
        topology: The ranks.
        number: As given.
    """

    def __init__(
        self,
        group: RankGroup,
        policy: ShardPolicy,
        failure: FailurePolicy,
        number: int,
        trace: Trace = OFF,
    ) -> None:
        self.topology = group.topology
        self.number = number
        self._comm = group.topology.comm
        self._policy = policy
        self._failure = failure
        self._trace = trace
        self._group = group
        self._detector = group.detector
        self._pending: object = None
        self._pid = os.getpid()
        self._exit = ExitHook(self, failure.leave)

    def allreduce(
        self,
        values: NDArray[_N],
        op: MPI.Op,
        step: int,
        phase: str,
        progress: Callable[[], object] | None = None,
    ) -> NDArray[_N]:
        """Reduce a few numbers over all ranks; also a barrier, as each result needs every rank.

        Collective: every rank, with the same shape of ``values``.

        Args:
            values: [n], left as they are.
            op: For example ``MPI.MAX``.
            step: Number of the step that this belongs to, for messages.
            phase: What is being done, for messages.
            progress: Called over and over while this rank waits, for what others need of it.

        Raises:
            RankFailureError: A rank has left the job, or did not respond within the time allowed.
                The communicator cannot be used after that.
        """
        result = np.empty_like(values)
        operation = self._comm.Iallreduce
        self._meet(Where(step, phase), operation, values, result, op, progress=progress)
        return result

    def allgather(self, value: _T, step: int, phase: str) -> list[_T]:
        """Return the values of all ranks, by rank.

        Collective: every rank.

        Args:
            value: Anything that can be pickled.
            step: As for ``allreduce``.
            phase: As for ``allreduce``.

        Raises:
            RankFailureError: As ``allreduce`` does.
        """
        where = Where(step, phase)
        own = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.empty(self._comm.size, np.int64)
        self._meet(where, self._comm.Iallgather, np.array([own.size]), sizes)
        everyone = np.empty(sizes.sum(), np.uint8)
        self._meet(where, self._comm.Iallgatherv, own, (everyone, sizes.tolist()))
        return [pickle.loads(part.tobytes()) for part in np.split(everyone, np.cumsum(sizes)[:-1])]

    def bcast(self, array: _Floats, root: int, step: int, phase: str) -> None:
        """Copy an array, contiguous, from ``root`` to every rank; raises as ``wait`` does.

        Collective: every rank.
        """
        for piece in _messages(array):
            self._meet(Where(step, phase), self._comm.Ibcast, piece, root)

    def send(self, array: _Floats, rank: int, step: int, phase: str) -> None:
        """Send an array, contiguous, to a rank that receives it now; raises as ``wait`` does."""
        for piece in _messages(array):
            self._exchange(Where(step, phase), rank, self._comm.Isend, piece)

    def receive(self, array: _Floats, rank: int, step: int, phase: str) -> None:
        """Receive an array, contiguous, that a rank sends now; raises as ``wait`` does."""
        for piece in _messages(array):
            self._exchange(Where(step, phase), rank, self._comm.Irecv, piece)

    def wait(
        self,
        test: Callable[[], bool],
        step: int,
        phase: str,
        awaited: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        """Wait for something that other ranks do.

        Args:
            test: Whether it is done; called over and over, so it may also make progress.
            step: As for ``allreduce``.
            phase: As for ``allreduce``.
            awaited: Returns the ranks that it depends on at this moment, if they are known.

        Raises:
            RankFailureError: As ``allreduce`` does; or MPI reports a broken connection.
            ThreadError: Another thread waits for these ranks.
        """
        self._wait(test, Where(step, phase), awaited)

    def _wait(
        self,
        test: Callable[[], bool],
        where: Where,
        awaited: Callable[[], Sequence[int]],
        check_others: Callable[[], None] = lambda: None,
    ) -> None:
        def check(waited_s: float) -> None:
            self._trace.flush()  # others may never come
            check_others()
            timeout_s = self._policy.timeout_s
            if found := self._detector.check(where, waited_s, timeout_s, awaited()):
                self._failure.on_missing(RankFailureError(found.message), found.ranks)

        if not self._group.in_use.acquire(blocking=False):
            raise ThreadError(
                "optimizers of one communicator must be used by one thread at a time; got "
                f"{where} while another thread waits for other ranks. Pass each optimizer a "
                "communicator of its own: comm=comm.Dup()."
            )
        try:
            waiting = self._trace.span("wait", where, ranks=awaited)
            with waiting, self.translate_mpi_errors(*where, awaited):
                self._detector.begin()
                wait_until(test, check)
        finally:
            self._group.in_use.release()

    def meet_on_node(
        self, test: Callable[[], bool], step: int, phase: str, awaited: Callable[[], Sequence[int]]
    ) -> bool:
        """Wait for something to which all ranks of this node contribute in the same call.

        Collective: every rank of the node.

        Args:
            test: As for ``wait``.
            step: As for ``allreduce``.
            phase: As for ``allreduce``.
            awaited: Returns the ranks of the node that have not contributed.

        Returns:
            Whether it is done. If not, one of those ranks waits for all ranks in another call.

        Raises:
            RankFailureError: As ``wait`` does.
        """
        arrivals = self._detector.arrivals
        arrivals.arrive(step, self.number)

        def require_all_here() -> None:
            # Read first: whoever has contributed and gone on is no longer awaited below.
            elsewhere = arrivals.elsewhere()
            if elsewhere and not set(elsewhere).isdisjoint(awaited()):
                raise _ElsewhereError

        is_done = False
        try:
            self._wait(test, Where(step, phase), awaited, require_all_here)
            is_done = True
        except _ElsewhereError:
            pass
        finally:
            if not is_done:
                arrivals.withdraw()
        return is_done

    @contextmanager
    def translate_mpi_errors(
        self, step: int, phase: str, awaited: Callable[[], Sequence[int]] = tuple
    ) -> Iterator[None]:
        """Turn errors of MPI into errors that name the lost ranks.

        Args:
            step: As for ``allreduce``.
            phase: As for ``allreduce``.
            awaited: As for ``wait``.

        Raises:
            RankFailureError: In place of an error of MPI.
        """
        try:
            yield
        except MPI.Exception as cause:
            found = self._detector.describe_lost(Where(step, phase), cause, awaited())
            error = RankFailureError(found.message)
            error.__cause__ = cause
            self._failure.on_lost(error, found.ranks)

    def free(self) -> None:
        """Note that this rank needs the others no more; what is shared belongs to the group."""
        self._exit.cancel()

    def _meet(
        self,
        where: Where,
        operation: Callable[..., MPI.Request],
        *args: object,
        progress: Callable[[], object] | None = None,
    ) -> None:
        self._require_usable(where)
        self._detector.arrivals.arrive(where.step)
        self._complete(where, [], operation, *args, progress=progress)
        self._detector.met(where.step)

    def _exchange(
        self, where: Where, rank: int, operation: Callable[..., MPI.Request], piece: object
    ) -> None:
        self._require_usable(where)
        self._complete(where, [rank], operation, piece, rank)

    def _complete(
        self,
        where: Where,
        awaited: Sequence[int],
        operation: Callable[..., MPI.Request],
        *args: object,
        progress: Callable[[], object] | None = None,
    ) -> None:
        with self.translate_mpi_errors(*where, lambda: awaited):
            request = operation(*args)
        self._pending = request, args  # MPI may write to its arrays even if waiting is given up

        def is_complete() -> bool:
            if progress is not None:
                progress()
            return request.Test()

        self.wait(is_complete, *where, lambda: awaited)
        self._pending = None

    def _require_usable(self, where: Where) -> None:
        """Raise in a forked child and after MPI.Finalize(), rather than have MPI crash."""
        if mpi_is_usable(self._pid):
            return
        if os.getpid() != self._pid:
            raise ClosedError(
                f"{where} must be taken by the process that built the optimizer; got a call in a "
                "child that was forked from it. Use the optimizer in the parent only."
            )
        raise ClosedError(
            f"{where} must come before MPI.Finalize(); got a call after it. Call MPI.Finalize() "
            "last, or leave it to mpi4py."
        )


def _messages(array: _Floats) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, array.size, _MESSAGE_NUMEL):
        yield array[start : start + _MESSAGE_NUMEL].view(np.uint8)  # MPI knows no bfloat16
