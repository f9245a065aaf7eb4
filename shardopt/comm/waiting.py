"""Waits with a deadline: for calls that can be polled, and for those that cannot."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import TIMEOUT_MAX, Timer

from mpi4py import MPI

from shardopt.comm.failure import FailurePolicy

LOOKS = 8
"""Tests between two naps: in one, an MPI may move no more than 64 KiB of each connection."""

CONSTRUCTION = "the construction of an optimizer"
"""Stands for the user's call, in messages, where it is not known which optimizer is built."""

_NUM_SPINS = 200  # some 50 us: long enough to meet a rank that has a core of its own
_YIELD_FOR_S = 0.005
_NAP_S = 0.0002
_CHECK_EVERY_S = 0.1


def wait_until(
    test: Callable[[], bool], check: Callable[[float], None], *, nap_s: float = _NAP_S
) -> None:
    """Wait until ``test`` returns True: spin for a moment, then yield the core, then nap.

    Args:
        test: Whether the wait is over; called over and over, so it may also make progress.
        check: Called every 0.1 s with the seconds waited so far; it raises to give up.
        nap_s: Length of a nap.
    """
    for _ in range(_NUM_SPINS):
        if test():
            return
    start = checked_at = time.monotonic()
    while not any(test() for _ in range(LOOKS)):
        now = time.monotonic()
        if now - start < _YIELD_FOR_S:
            os.sched_yield()
            continue
        time.sleep(nap_s)
        if now - checked_at > _CHECK_EVERY_S:
            checked_at = now
            check(now - start)


def wait_briefly(test: Callable[[], bool], limit_s: float, *, yields: bool = True) -> bool:
    """Wait until ``test`` returns True, or for ``limit_s`` seconds at most; return which it was.

    Args:
        test: Whether the wait is over; called over and over, so it may also make progress.
        limit_s: The longest time.
        yields: Whether to yield the core at first, rather than to nap: that costs the core's time,
            and is worth it only where an early end is worth something.
    """
    start = time.monotonic()
    while not any(test() for _ in range(LOOKS)):
        waited_s = time.monotonic() - start
        if waited_s > limit_s:
            return False
        if yields and waited_s < _YIELD_FOR_S:
            os.sched_yield()
        else:
            time.sleep(_NAP_S)
    return True


@contextmanager
def overdue(timeout_s: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Call ``give_up`` in another thread if the body takes longer than ``timeout_s``.

    mpi4py releases the GIL in blocking calls, so the body may contain them.
    """
    timer = Timer(min(timeout_s, TIMEOUT_MAX), give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def deadline(timeout_s: float, call: str, failure: FailurePolicy) -> Iterator[None]:
    """Report to ``failure`` if the body takes longer: an allocation, or a new communicator.

    Such a call blocks until every rank has made it, and cannot be given up. Unlike the waits of
    ``Collectives`` it cannot tell which rank is missing, so the message names the rank that waits.

    Args:
        timeout_s: Longest time.
        call: The call that the user made, for the message.
        failure: What to do then.
    """

    def give_up() -> None:
        failure.on_overdue(
            f"{call} did not complete within {timeout_s:g} s on rank {MPI.COMM_WORLD.rank} on "
            f"{MPI.Get_processor_name()}; the stack shows where it waits. Look for a rank or host "
            "that died or hangs, or raise policy.timeout_s if they are only slow."
        )

    with overdue(timeout_s, give_up):
        yield
