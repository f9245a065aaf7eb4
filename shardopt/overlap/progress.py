"""The thread that sends gradients while backward computes."""

import enum
import threading
import time
import weakref
from contextlib import suppress

import numpy as np
from mpi4py import MPI

from shardopt.comm.exit_hook import ExitHook
from shardopt.comm.flags import NodeFlags
from shardopt.comm.waiting import LOOKS
from shardopt.store.memory import Memory
from shardopt.transport.reduction import Reduction
from shardopt.transport.sync import BucketSync

_NAP_S = 0.0003
_LOCK_TIMEOUT_S = 0.1
_MAX_DRAIN_S = 5.0


class State(enum.Enum):
    """Who works with the synchronisation: only one of the two ever does."""

    COLLECTING = enum.auto()
    """The thread: it starts the buckets that all ranks of the node have announced."""
    HELD = enum.auto()
    """The step: the thread waits."""


class ProgressThread:
    """Starts the buckets that all ranks of the node have announced, and keeps them moving.

    Collective over the node: construction and ``free``.

    Args:
        memory: Where gradients are read from.
        sync: Sends them.

    Attributes:
        num_announced: Buckets that are ready on this rank, without a gap.
        state: Who works with ``sync``.
        error: The exception that ended the thread's work, or None; ``hold`` raises it.
    """

    def __init__(self, memory: Memory, sync: BucketSync) -> None:
        self.num_announced = 0
        self.state = State.HELD
        self.error: Exception | None = None
        self._memory = memory
        self._sync = sync
        self._flags = NodeFlags(memory.arena, 1)
        self._step = 0
        self._wake, self._ended, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._lock.acquire()
        arguments = weakref.ref(self), self._ended, self._wake, self._lock
        self._thread = threading.Thread(
            target=_run, args=arguments, name="shardopt exchange", daemon=True
        )
        self._thread.start()
        self._exit = ExitHook(self, _end, self._ended, self._wake, self._thread, sync.reduction)

    def announce(self, num_buckets: int) -> None:
        """Announce to the node that the first ``num_buckets`` buckets are ready on this rank.

        Publish the gradients in them first; see [Note: when stores become visible].
        """
        self.num_announced = num_buckets
        self._flags.mine[0] = self._step << 32 | num_buckets
        self._flags.publish()
        self._wake.set()

    def hold(self) -> None:
        """Take ``sync`` over from the thread.

        Raises:
            Exception: The thread's error.
        """
        self._take_over()
        if self.error is not None:
            raise self.error

    def retract(self) -> None:
        """Take ``sync`` over, and all announcements back: the same step may be collected again.

        That must not happen before all ranks have retracted. An error of the thread is left for
        ``hold``, whose callers can agree on it.
        """
        self._flags.mine[0] = 0
        self._flags.publish()
        self._take_over()

    def collect(self, step: int) -> None:
        """Hand ``sync`` to the thread, for the gradients of step ``step``."""
        self._step, self.num_announced = step, 0
        if self.state is State.HELD:
            self.state = State.COLLECTING
            self._lock.release()

    def num_ready(self) -> int:
        """Return how many buckets all ranks of the node have announced for this step."""
        self._flags.acquire()
        announced = self._flags.all[:, 0]
        current = np.where(announced >> 32 == self._step, announced & 0xFFFFFFFF, 0)
        self._memory.acquire()  # the gradients in them can be read from here on
        return int(current.min())

    def free(self) -> None:
        """End the thread and release what is shared. Collective over the node."""
        self._exit()

    def _take_over(self) -> None:
        if self.state is State.COLLECTING:
            self._lock.acquire()
            self.state = State.HELD

    def work(self) -> bool:
        """Make progress without waiting; return whether there will be more to do."""
        reduction = self._sync.reduction
        try:
            with self._sync.translate_mpi_errors():
                reduction.advance(self.num_ready())
        except Exception as error:  # for the next step to raise
            self.error = error
        more = reduction.num_started < self.num_announced or not reduction.is_idle
        return more and self.error is None


def _run(
    owner: "weakref.ref[ProgressThread]",
    ended: threading.Event,
    wake: threading.Event,
    lock: threading.Lock,
) -> None:
    """Work for an owner as long as it is alive: it must not be kept so by its thread."""
    while not ended.is_set():
        wake.wait()
        wake.clear()
        is_busy = True
        while is_busy and not ended.is_set():
            if lock.acquire(timeout=_LOCK_TIMEOUT_S):
                try:
                    alive = owner()
                    is_busy = alive is not None and all(alive.work() for _ in range(LOOKS))
                    del alive
                finally:
                    lock.release()
                time.sleep(_NAP_S)


def _end(
    ended: threading.Event, wake: threading.Event, thread: threading.Thread, reduction: Reduction
) -> None:
    """End the thread before MPI ends; others may still wait for messages in transit."""
    ended.set()
    wake.set()
    if thread is not threading.current_thread():  # which may find its owner to be garbage
        thread.join()
    stop = time.monotonic() + _MAX_DRAIN_S
    with suppress(MPI.Exception):  # of ranks that are gone
        while not reduction.is_quiet() and time.monotonic() < stop:
            time.sleep(_NAP_S)
