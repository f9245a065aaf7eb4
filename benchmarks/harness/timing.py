"""Timing of contenders in turn, and of the other jobs on the machine."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mpi4py import MPI

from benchmarks.harness.result import Samples

_PAUSE_S = 0.01
"""Between two contenders, so that threads which spin for more work have gone to sleep."""

_NAP_S = 0.02
"""Between two looks for ranks that are at work: 64 that wait take under one percent of a core."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Distinguishes machines: virtual hosts of one machine share it, as they share its cores."""


def sample(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    comm: MPI.Intracomm = MPI.COMM_SELF,
    warmup: int = 2,
    networked: bool = False,
) -> tuple[Samples, float]:
    """Time the contenders in turn, round by round, so that a busy minute falls on all of them.

    Collective: every rank of ``comm``. A sample is the time of the slowest rank.

    Args:
        contenders: The functions to call, by name.
        rounds: How many times each.
        comm: Ranks that run together.
        warmup: Rounds before those that count.
        networked: As in ``Neighbours``.

    Returns:
        Seconds by contender, and the share of the cores that other jobs took meanwhile.
    """
    samples: Samples = {name: [] for name in contenders}
    neighbours = Neighbours(comm, networked=networked)
    for number in range(-warmup, rounds):
        for name, run in contenders.items():
            spent_s = slowest_s(run, comm)
            if number >= 0:
                samples[name].append(spent_s)
    return samples, neighbours.share()


def slowest_s(run: Callable[[], object], comm: MPI.Intracomm) -> float:
    """Start ``run`` on all ranks at once and return the time of the slowest. Collective."""
    time.sleep(_PAUSE_S)
    comm.Barrier()
    start_s = time.perf_counter()
    run()
    slowest: float = comm.allreduce(time.perf_counter() - start_s, MPI.MAX)
    return slowest


@contextmanager
def collecting_only_new() -> Iterator[None]:
    """Keep the garbage collector from scanning older objects, in whichever round it runs."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def meet_asleep(comm: MPI.Intracomm) -> None:
    """Wait until all ranks have come here, without taking a core meanwhile. Collective."""
    arrival = comm.Ibarrier()
    while not arrival.Test():
        time.sleep(_NAP_S)


class Neighbours:
    """Other jobs, watched from now on. Collective: construction and every method.

    Args:
        comm: The ranks of this job.
        networked: Leave out interrupts, which are what moves this job's packets.
    """

    def __init__(self, comm: MPI.Intracomm, *, networked: bool = False) -> None:
        self._comm, self._networked = comm, networked
        self._all_s, self._own_s = _cores_spent_s(networked), time.process_time()
        self._begin_s = time.perf_counter()

    def share(self) -> float:
        """Return the share of the cores that they have taken."""
        mine = _BOOT_ID.read_text(), time.process_time() - self._own_s
        own_s = sum(spent_s for boot, spent_s in self._comm.allgather(mine) if boot == mine[0])
        others_s = max(0.0, _cores_spent_s(self._networked) - self._all_s - own_s)
        share = others_s / (time.perf_counter() - self._begin_s) / (os.cpu_count() or 1)
        highest: float = self._comm.allreduce(share, MPI.MAX)
        return highest


def require_one_rank(case: str) -> None:
    """Make sure that this job has one rank.

    Raises:
        RuntimeError: It has more.
    """
    if MPI.COMM_WORLD.size > 1:
        raise RuntimeError(
            f"{case} must run on one rank; got {MPI.COMM_WORLD.size}. Start it without mpirun."
        )


def _cores_spent_s(networked: bool) -> float:
    """Return the seconds that all cores together have been busy since the machine started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    interrupts = 0 if networked else irq + softirq
    return (user + nice + system + interrupts) / os.sysconf("SC_CLK_TCK")
