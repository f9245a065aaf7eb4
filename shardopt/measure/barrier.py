"""The time of a barrier."""

import time

from mpi4py import MPI

_WARM_UP = 8  # connections are made at the first message
_MAX_BARRIERS = 10_000


def measure_barrier(comm: MPI.Intracomm, budget_s: float) -> float | None:
    """Measure a barrier; the number of repetitions follows from a first few.

    Collective: every rank of ``comm``.

    Args:
        comm: The ranks.
        budget_s: Seconds that the repetitions may take, approximately.

    Returns:
        Seconds per barrier on this rank, or None for a single rank.
    """
    if comm.size == 1:
        return None
    once_s = time_barriers(comm, _WARM_UP)
    count = comm.bcast(max(_WARM_UP, min(_MAX_BARRIERS, int(budget_s / once_s))))
    return time_barriers(comm, count)


def time_barriers(comm: MPI.Intracomm, repetitions: int) -> float:
    """Return the seconds per barrier, averaged over ``repetitions``. Collective."""
    start_s = time.perf_counter()
    for _ in range(repetitions):
        comm.Barrier()
    return (time.perf_counter() - start_s) / repetitions
