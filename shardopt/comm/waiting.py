"""A deadline for calls of MPI that cannot be given up once they have begun."""

import faulthandler
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer

from mpi4py import MPI

from shardopt.comm.failure import end_job


@contextmanager
def overdue(timeout_s: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Call ``give_up``, in a thread, if what is inside takes longer.

    mpi4py lets go of the interpreter in calls that block, so these may be inside.
    """
    timer = Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def deadline(timeout_s: float, call: str) -> Iterator[None]:
    """End the job if what is inside takes longer: an allocation of windows, a new communicator.

    Such a call waits for all ranks and cannot be asked who is missing, unlike the waits of
    ``Collectives``. So a thread says where this rank is stuck.

    Args:
        timeout_s: Longest time.
        call: What the user has called, for the message.
    """

    def give_up() -> None:
        faulthandler.dump_traceback()
        sys.stderr.write(
            f"shardopt.errors.RankFailureError: every rank must complete {call}; got no end of it "
            f"for {timeout_s} s on rank {MPI.COMM_WORLD.rank} on {MPI.Get_processor_name()}. Look "
            "for a rank or host that died or hangs, or raise policy.timeout_s if they are only "
            "slow.\n"
        )
        end_job(1)

    with overdue(timeout_s, give_up):
        yield
