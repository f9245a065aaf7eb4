"""A deadline for calls of MPI that cannot be given up once they have begun."""

import faulthandler
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mpi4py import MPI

from shardopt.comm.abort import end_job


@contextmanager
def deadline(timeout_s: float, call: str) -> Iterator[None]:
    """End the job if what is inside takes longer: an allocation of windows, a new communicator.

    Such a call waits for all ranks and cannot be asked who is missing, unlike the waits of
    ``RollCall``. So a thread says where this rank is stuck.

    Args:
        timeout_s: Longest time.
        call: What the user has called, for the message.
    """
    timer = threading.Timer(timeout_s, _end_overdue, [timeout_s, call])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_overdue(timeout_s: float, call: str) -> None:
    faulthandler.dump_traceback()
    sys.stderr.write(
        f"shardopt.errors.RankFailureError: every rank must complete {call}; got no end of it for "
        f"{timeout_s} s on rank {MPI.COMM_WORLD.rank} on {MPI.Get_processor_name()}. Look for a "
        "rank or host that died or hangs, or raise policy.timeout_s if they are only slow.\n"
    )
    end_job(1)
