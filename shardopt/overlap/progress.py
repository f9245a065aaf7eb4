"""The thread that sends gradients while backward computes, and parameters in forward."""

import enum
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt.comm.exit_hook import ExitHook
from shardopt.comm.flags import NodeFlags
from shardopt.comm.waiting import LOOKS
from shardopt.store.memory import Memory
from shardopt.transport.buckets import BucketPlan
from shardopt.transport.reduction import Reduction
from shardopt.transport.sync import BucketSync

_GRADS, _PARAMS = 0, 1  # the fields of flags
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

    It also keeps moving the parameters that ``BucketSync.publish_later`` has left to it. Once all
    of them are complete, others may use the all-gather.

    Collective over the node: construction and ``free``.

    Args:
        memory: Where gradients are read from.
        sync: Sends them.
        sends_grads: Whether it sends gradients. If not, it never touches the reduction, which
            others may use at any time.

    Attributes:
        num_announced: Buckets that are ready on this rank, without a gap.
        state: Who works with ``sync``.
        error: The exception that ended the thread's work, or None; ``hold`` raises it.
    """

    def __init__(self, memory: Memory, sync: BucketSync, *, sends_grads: bool = True) -> None:
        self.num_announced = 0
        self.state = State.HELD
        self.error: Exception | None = None
        self._memory = memory
        self._sync = sync
        self._sends_grads = sends_grads
        self._flags = NodeFlags(memory.arena, 2)
        self._num_left = 0  # buckets of parameters that are still on their way
        self._num_sent = 0  # how often parameters have been sent; step numbers may come again
        self._step = 0
        self._wake, self._ended, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._lock.acquire()
        arguments = weakref.ref(self), self._ended, self._wake, self._lock
        self._thread = threading.Thread(
            target=_run, args=arguments, name="shardopt exchange", daemon=True
        )
        self._thread.start()
        ending = self._ended, self._wake, self._thread
        reduction = sync.reduction if sends_grads else None
        self._exit = ExitHook(self, _end, *ending, sync, reduction, self._flags)

    def announce(self, num_buckets: int) -> None:
        """Announce to the node that the first ``num_buckets`` buckets are ready on this rank.

        Publish the gradients in them first; see [Note: when stores become visible].
        """
        self.num_announced = num_buckets
        self._show(_GRADS, self._step, num_buckets)
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
        self._show(_GRADS, 0, 0)
        self._take_over()

    def collect(self, step: int) -> None:
        """Hand ``sync`` to the thread, for the gradients of step ``step``."""
        self._step, self.num_announced = step, 0
        if self.state is State.HELD:
            self.state = State.COLLECTING
            self._lock.release()
            self._wake.set()  # there may be parameters to send

    def num_ready(self) -> int:
        """Return how many buckets all ranks of the node have announced for this step."""
        return int(self._shown(_GRADS, self._step).min())

    # -- parameters --------------------------------------------------------------------------------

    def send_params(self, plans: Sequence[BucketPlan]) -> None:
        """Send the parameters that a step has updated from now on; see ``publish_later``."""
        self._num_sent += 1
        self._sync.publish_later(plans)
        self._num_left = self._sync.advance_params()
        self._show(_PARAMS, self._num_sent, self._sync.num_published)

    def num_landed(self) -> list[int]:
        """Return how many buckets of parameters are complete, for each rank of the node.

        What they hold can be read afterwards.
        """
        landed: list[int] = self._shown(_PARAMS, self._num_sent).tolist()
        return landed

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Do the thread's work in its place for a while, by calling ``work``."""
        is_collecting = self.state is State.COLLECTING
        if is_collecting:
            self._lock.acquire()
        try:
            yield
        finally:
            if is_collecting:
                self._lock.release()
                self._wake.set()

    # -- inside ------------------------------------------------------------------------------------

    def _show(self, field: int, number: int, count: int) -> None:
        self._flags.mine[field] = number << 32 | count
        self._flags.publish()

    def _shown(self, field: int, number: int) -> NDArray[np.int64]:
        """Return the counts that the ranks of the node have shown with a number, else 0."""
        self._flags.acquire()
        shown = self._flags.all[:, field]
        current = np.where(shown >> 32 == number, shown & 0xFFFFFFFF, 0)
        self._memory.acquire()  # what it speaks of can be read from here on
        return current

    def free(self) -> None:
        """End the thread and release what is shared. Collective over the node."""
        self._exit()

    def _take_over(self) -> None:
        if self.state is State.COLLECTING:
            self._lock.acquire()
            self.state = State.HELD

    def work(self) -> bool:
        """Make progress without waiting; return whether there will be more to do."""
        has_more = False
        try:
            with self._sync.translate_mpi_errors():
                self._advance_params()
                has_more = self._sends_grads and self._advance_grads()
        except Exception as error:  # for the next step to raise
            self.error = error
        return (has_more or self._num_left > 0) and self.error is None

    def _advance_params(self) -> None:
        """Make progress with parameters, and show it.

        Once it shows that all are complete it does not touch the all-gather, which others may use.
        """
        if self._num_left:
            num_published = self._sync.num_published
            self._num_left = self._sync.advance_params()
            if self._sync.num_published != num_published:
                self._show(_PARAMS, self._num_sent, self._sync.num_published)

    def _advance_grads(self) -> bool:
        """Make progress with gradients; return whether there will be more to do."""
        reduction = self._sync.reduction
        reduction.advance(self.num_ready())
        return reduction.num_started < self.num_announced or not reduction.is_idle


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
    ended: threading.Event,
    wake: threading.Event,
    thread: threading.Thread,
    sync: BucketSync,
    reduction: Reduction | None,
    flags: NodeFlags,
) -> None:
    """End the thread before MPI ends; others may still wait for messages in transit."""
    ended.set()
    wake.set()
    if thread is not threading.current_thread():  # which may find its owner to be garbage
        thread.join()
    stop = time.monotonic() + _MAX_DRAIN_S
    with suppress(MPI.Exception):  # of ranks that are gone
        while True:
            num_before, num_left = sync.num_published, sync.advance_params()
            if num_new := sync.num_published - num_before:  # others of the node wait for them
                stop = time.monotonic() + _MAX_DRAIN_S
                flags.mine[_PARAMS] += num_new
                flags.publish()
            flags.acquire()
            is_quiet = (reduction is None or reduction.is_quiet()) and not num_left
            all_are_here = bool((flags.all[:, _PARAMS] >= flags.mine[_PARAMS]).all())
            if (is_quiet and all_are_here) or time.monotonic() > stop:
                return
            time.sleep(_NAP_S)


def drain(reduction: Reduction) -> None:
    """Wait until messages have arrived, before MPI ends or their memory is released."""
    stop = time.monotonic() + _MAX_DRAIN_S
    with suppress(MPI.Exception):  # of ranks that are gone
        while not reduction.is_quiet() and time.monotonic() < stop:
            time.sleep(_NAP_S)
