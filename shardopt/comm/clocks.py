"""How far apart the clocks of ranks are.

[Note: clocks of a trace]
Times of a trace come from the monotonic clock of a process, which all processes of a machine share
unless they are in different time namespaces. Other machines' clocks are compared with that of rank
0, by one rank per clock: it sends a message, rank 0 answers with its time, and that time lies
somewhere between the departure of the message and the arrival of the answer. So the offset is known
up to half of the round trip, whatever the two ways take; of several trips the shortest counts.
Clocks drift by some microseconds per second, so they are compared when an optimizer is built and
again when it is closed, and readers interpolate.

That takes every rank, or none: at construction ranks tell each other whether they trace, and if one
does, all compare.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from shardopt.comm.collectives import Collectives

_NUM_TRIPS = 16


class ClockOffset(NamedTuple):
    """The distance of a rank's clock from that of rank 0.

    Attributes:
        at_ns: When it was measured, by the rank's clock.
        offset_ns: To be added to the rank's clock.
        error_ns: The largest error of that.
    """

    at_ns: int
    offset_ns: int
    error_ns: int

    def trace_args(self) -> Mapping[str, object]:
        """Return what a trace shows of it."""
        return self._asdict()


def name_clock() -> str:
    """Return a name that processes have in common if their monotonic clocks are the same."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/time')}"
    except OSError:
        return f"{os.uname().nodename} {os.getpid()}"


def compare_clocks(
    collectives: Collectives,
    clocks: Sequence[str],
    step: int,
    call: str,
    now: Callable[[], int] = time.perf_counter_ns,
) -> ClockOffset:
    """Measure the distance of this rank's clock from that of rank 0.

    Collective: every rank.

    Args:
        collectives: The ranks.
        clocks: The name of each rank's clock; see ``name_clock``.
        step: Number of the last step, for messages.
        call: The user's call, likewise.
        now: This rank's clock, in nanoseconds.

    Raises:
        RankFailureError: As ``Collectives.allgather`` does.
    """
    rank = collectives.topology.rank
    measuring = [clocks.index(name) for name in dict.fromkeys(clocks)][1:]
    found = ClockOffset(now(), 0, 0)
    if rank == 0:
        for other in measuring:
            for _ in range(_NUM_TRIPS):
                collectives.receive(np.zeros(1), other, step, call)
                collectives.send(np.array([now()], np.float64), other, step, call)
    elif rank in measuring:
        trips = [_measure(collectives, step, call, now) for _ in range(_NUM_TRIPS)]
        found = min(trips, key=lambda trip: trip.error_ns)
    if not measuring:
        return found
    return collectives.allgather(found, step, call)[clocks.index(clocks[rank])]


def _measure(collectives: Collectives, step: int, call: str, now: Callable[[], int]) -> ClockOffset:
    """Send rank 0 a message, and compare the time in its answer."""
    answer, start_ns = np.zeros(1), now()
    collectives.send(np.zeros(1), 0, step, call)
    collectives.receive(answer, 0, step, call)
    end_ns = now()
    middle_ns = (start_ns + end_ns) // 2
    return ClockOffset(middle_ns, int(answer[0]) - middle_ns, (end_ns - start_ns) // 2 + 2)
