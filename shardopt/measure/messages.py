"""The cost of a message to the rank that sends it, beside the time of its bytes."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from mpi4py import MPI

from shardopt._typing import Array
from shardopt.comm.waiting import wait_until

SMALLEST_NBYTES = 16 << 10
"""A chunk of float32: the smallest message of a step."""

_WARM_UP = 8  # connections are made at the first message
_MIN_ROUNDS, _MAX_ROUNDS = 32, 20_000
_IN_FLIGHT = 16  # rounds, so that none waits for the previous one to arrive


class Message(Protocol):
    """A message in transit."""

    def is_done(self) -> bool:
        """Whether it is complete; makes progress."""
        ...


class Lane(Protocol):
    """Ranks of different nodes, and a way to send between them: ``shardopt.transport``'s."""

    @property
    def others(self) -> Sequence[int]:
        """The other nodes."""
        ...

    def post_send(self, array: Array, node: int, tag: int) -> Message:
        """Send an array."""
        ...

    def post_receive(self, array: Array, node: int, tag: int) -> Message:
        """Receive an array."""
        ...


def measure_messages(
    lane: Lane, comm: MPI.Intracomm, nbytes_per_s: float, budget_s: float
) -> float:
    """Send small messages to all others, and fit a line to time over their number.

    It is the cost of messages without content, or that of the smallest ones that a step sends
    beyond the time of their bytes, whichever is more: MPI asks before it sends these.

    Collective: every rank of ``comm``.

    Args:
        lane: Sends them.
        comm: Its ranks, at least two.
        nbytes_per_s: What this rank sends in large messages.
        budget_s: Seconds that it may take, approximately.

    Returns:
        Seconds for each message that this rank sends, while it receives as many.
    """
    empty_s = _fit(lane, comm, 0, 0.5 * budget_s)
    small_s = _fit(lane, comm, SMALLEST_NBYTES, 0.5 * budget_s)
    return max(empty_s, small_s - SMALLEST_NBYTES / nbytes_per_s)


def _fit(lane: Lane, comm: MPI.Intracomm, nbytes: int, budget_s: float) -> float:
    """Return the seconds that one more message of a size takes."""
    _exchange(lane, comm, nbytes, _WARM_UP)
    round_s = comm.allreduce(_exchange(lane, comm, nbytes, _WARM_UP), MPI.MAX) / _WARM_UP
    most = max(_MIN_ROUNDS, min(_MAX_ROUNDS, int(0.5 * budget_s / round_s)))
    counts = [most // 4, most // 2, most]
    times = [_exchange(lane, comm, nbytes, count) for count in counts]
    slope_s = float(np.polyfit(counts, times, 1)[0])
    if slope_s <= 0:  # a pause fell on the fewest
        slope_s = times[-1] / most
    return slope_s / len(lane.others)


def _exchange(lane: Lane, comm: MPI.Intracomm, nbytes: int, count: int) -> float:
    """Send to all others ``count`` times, and return the seconds until all have received it."""
    sent, received = np.zeros(nbytes, np.uint8), np.zeros((_IN_FLIGHT, nbytes), np.uint8)
    in_flight: deque[list[Message]] = deque()
    comm.Barrier()
    start_s = time.perf_counter()
    for number in range(count):
        if len(in_flight) == _IN_FLIGHT:
            _complete(in_flight.popleft())
        row = received[number % _IN_FLIGHT]
        receives = [lane.post_receive(row, node, 0) for node in lane.others]
        in_flight.append([*receives, *(lane.post_send(sent, node, 0) for node in lane.others)])
    for messages in in_flight:
        _complete(messages)
    comm.Barrier()
    return time.perf_counter() - start_s


def _complete(messages: list[Message]) -> None:
    """Wait for messages as a step does; a deadline is the caller's."""

    def are_done() -> bool:
        messages[:] = [message for message in messages if not message.is_done()]
        return not messages

    wait_until(are_done, lambda waited_s: None)
