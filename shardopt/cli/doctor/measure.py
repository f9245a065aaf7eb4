"""How fast memory, barriers and links are: short measurements, all ranks taking part."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import cast

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt.cli.doctor.facts import Link, Speeds
from shardopt.cli.doctor.watch import Watch
from shardopt.comm.topology import Topology, cores_per_rank

_Arrays = tuple[NDArray[np.float32], NDArray[np.float32]]

_NBYTES_PER_S = 128 << 20  # of budget: more than caches hold, but pages take their time
_MAX_THREADS = 16  # more would wait for Python's interpreter
_BLOCK_NUMEL = 256 << 10  # between two looks at the clock
_WARM_UP = 8  # connections are made at the first message
_MIN_NBYTES, _MAX_NBYTES, _MESSAGE_S = 64 << 10, 16 << 20, 0.01  # of a message
_NUM_TRIES = 3  # of a link
_IN_FLIGHT = 3  # messages each way, so that none waits for another to begin


def measure(topology: Topology, watch: Watch, budget_s: float) -> Speeds | None:
    """Measure the job; rank 0 gets the result, others None. Collective.

    Args:
        topology: Nodes may be of unequal sizes.
        watch: Ends the job when a measurement does not end.
        budget_s: Seconds that all measurements may take, about.
    """
    memory = measure_memory(topology, watch, int(budget_s * _NBYTES_PER_S), 0.2 * budget_s)
    with watch.together("the measurement of barriers", topology.comm):
        barrier_s = _time_barrier(topology.node_comm, 0.05 * budget_s)
    links = measure_links(topology, watch, 0.4 * budget_s)
    exchange = measure_exchange(topology, watch, links, 0.2 * budget_s)
    with watch.together("the gathering of measurements", topology.comm):
        rows = topology.comm.gather((topology.node, memory, barrier_s, links, exchange))
    if rows is None:
        return None
    barriers = {node: barrier_s for node, _, barrier_s, _, _ in rows}
    several = topology.num_nodes > 1
    return Speeds(
        memory=tuple(_sum_by_node([(row[0], row[1]) for row in rows])),
        barrier_s=tuple(barriers[node] for node in sorted(barriers)),
        links=tuple(sorted((link for row in rows for link in row[3]), key=lambda link: link.nodes)),
        exchange=tuple(_sum_by_node([(row[0], row[4]) for row in rows])) if several else (),
    )


def _sum_by_node(pairs: Sequence[tuple[int, float]]) -> list[float]:
    sums = dict.fromkeys(sorted({node for node, _ in pairs}), 0.0)
    for node, value in pairs:
        sums[node] += value
    return list(sums.values())


# -- within a node ---------------------------------------------------------------------------------


def measure_memory(topology: Topology, watch: Watch, node_nbytes: int, budget_s: float) -> float:
    """Measure what this rank gets of its node's memory while all use it, in bytes/s. Collective."""
    with watch.together("the measurement of memory", topology.comm):
        num_threads = min(cores_per_rank(topology), _MAX_THREADS)
        numel = node_nbytes // (2 * 4 * topology.node_size * num_threads)
        with ThreadPoolExecutor(num_threads) as pool:
            held = list(pool.map(_make_arrays, [max(numel, 2 * _BLOCK_NUMEL)] * num_threads))
            watch.meet(topology.comm)
            return sum(pool.map(lambda arrays: _time_sum(arrays, budget_s), held))


def _make_arrays(numel: int) -> _Arrays:
    return np.ones(numel, np.float32), np.full(numel, 1e-6, np.float32)  # np.zeros has no pages yet


def _time_sum(arrays: _Arrays, budget_s: float) -> float:
    """Compute a += b and return the bytes/s of two reads and a write, an update's way of access."""
    a, b = arrays
    num_blocks = len(a) // _BLOCK_NUMEL
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < budget_s:
        block = slice((count % num_blocks) * _BLOCK_NUMEL, (count % num_blocks + 1) * _BLOCK_NUMEL)
        np.add(a[block], b[block], out=a[block])
        count += 1
    return count * 3 * a.itemsize * _BLOCK_NUMEL / elapsed


def _time_barrier(comm: MPI.Intracomm, budget_s: float) -> float | None:
    if comm.size == 1:
        return None
    once = _time_barriers(comm, _WARM_UP)
    count = comm.bcast(max(_WARM_UP, min(10_000, int(budget_s / once))))
    return _time_barriers(comm, count)


def _time_barriers(comm: MPI.Intracomm, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        comm.Barrier()
    return (time.perf_counter() - start) / count


# -- between nodes ---------------------------------------------------------------------------------


def measure_links(topology: Topology, watch: Watch, budget_s: float) -> list[Link]:
    """Measure the links of neighbouring nodes; the first node of each gets the result.

    The first ranks of the nodes do it, several times: what else runs makes a link slower, never
    faster. Collective: all ranks.
    """
    rounds = plan_rounds(topology.num_nodes)
    best: dict[tuple[int, int], Link] = {}
    for pairs in rounds * _NUM_TRIES:
        with watch.together("the measurement of links between nodes", topology.comm):
            for pair in pairs:
                if topology.node in pair and topology.node_rank == 0:
                    link = _measure_link(topology, pair, budget_s / (len(rounds) * _NUM_TRIES))
                    best[pair] = link.better_of(best.get(pair, link))
    return [link for pair, link in best.items() if pair[0] == topology.node]


def _measure_link(topology: Topology, pair: tuple[int, int], budget_s: float) -> Link:
    leads = pair[0] == topology.node
    peer = topology.places.index((pair[1] if leads else pair[0], 0))
    return Link(
        nodes=pair,
        latency_s=_time_message(topology.comm, peer, leads, 0.2 * budget_s),
        nbytes_per_s=_time_both_ways(topology.comm, peer, leads, 0.8 * budget_s),
    )


def plan_rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Pair each node with the next, the last with the first, so that no node is in two pairs."""
    if num_nodes < 3:
        return [[(0, 1)]] if num_nodes == 2 else []
    ring = [(node, (node + 1) % num_nodes) for node in range(num_nodes)]
    odd_one = [ring.pop()] if num_nodes % 2 else []
    return [pairs for pairs in (ring[0::2], ring[1::2], odd_one) if pairs]


def _time_message(comm: MPI.Intracomm, peer: int, leads: bool, budget_s: float) -> float:
    """Send 8 bytes to and fro, and return the time of one way."""
    last = np.zeros(1, np.int64)
    start, count = time.perf_counter(), -_WARM_UP
    while not last[0]:
        if count == 0:
            start = time.perf_counter()
        if leads:
            last[0] = count > 0 and time.perf_counter() - start > budget_s
            comm.Send(last, peer)
            comm.Recv(last, peer)
        else:
            comm.Recv(last, peer)
            comm.Send(last, peer)
        count += 1
    return (time.perf_counter() - start) / (2 * count)


def _time_both_ways(comm: MPI.Intracomm, peer: int, leads: bool, budget_s: float) -> float:
    """Send large messages in both directions at once, and return the bytes/s of each."""
    rate, plan = _probe(comm, peer, leads, 0.1 * budget_s), np.empty(2, np.int64)
    if leads:
        plan[:] = plan_messages(rate, 0.9 * budget_s)
        comm.Send(plan, peer)
    else:
        comm.Recv(plan, peer)
    nbytes, count = map(int, plan)
    sign, answer = np.zeros(1, np.uint8), np.zeros(1, np.uint8)
    meet = partial(comm.Sendrecv, sign, peer, recvbuf=answer, source=peer)
    return _time_stream(comm, [(peer, peer)], nbytes, count, meet)


def _probe(comm: MPI.Intracomm, peer: int, leads: bool, budget_s: float) -> float:
    """Send small messages in both directions until time is up, and return the bytes/s of each."""
    there, back = np.zeros(_MIN_NBYTES, np.uint8), np.zeros(_MIN_NBYTES, np.uint8)
    word = there if leads else back  # its first byte tells both sides whether it is the last
    start, count = time.perf_counter(), 0
    while not word[0]:
        there[0] = leads and time.perf_counter() - start > budget_s
        comm.Sendrecv(there, peer, recvbuf=back, source=peer)
        count += 1
    return _MIN_NBYTES * count / (time.perf_counter() - start)


def plan_messages(rate: float, budget_s: float) -> tuple[int, int]:
    """Choose bytes and number of messages, for a link of so many bytes/s."""
    nbytes = _MIN_NBYTES
    while nbytes < min(rate * _MESSAGE_S, _MAX_NBYTES):
        nbytes *= 2
    return nbytes, max(_IN_FLIGHT, int(rate * budget_s / nbytes))


def measure_exchange(
    topology: Topology, watch: Watch, links: Sequence[Link], budget_s: float
) -> float:
    """Let every node send to every other at once, by as many lanes as all have. Collective.

    Returns:
        What this rank sent, in bytes/s.
    """
    if topology.num_nodes == 1:
        return 0.0
    with watch.together("the measurement of all links at once", topology.comm):
        num_lanes = topology.comm.allreduce(topology.node_size, MPI.MIN)
        slowest = min((link.nbytes_per_s for link in links), default=float("inf"))
        rate = topology.comm.allreduce(slowest, MPI.MIN) / num_lanes
        color = topology.node_rank if topology.node_rank < num_lanes else MPI.UNDEFINED
        lane = cast("MPI.Intracomm", topology.comm.Split(color, topology.rank))
        if lane == MPI.COMM_NULL:
            return 0.0
        shifts = range(1, lane.size)
        peers = [
            ((lane.rank + shift) % lane.size, (lane.rank - shift) % lane.size) for shift in shifts
        ]
        nbytes, count = plan_messages(rate, budget_s)
        sent = _time_stream(lane, peers, nbytes, count, lane.Barrier)
        lane.Free()
        return sent


def _time_stream(
    comm: MPI.Intracomm,
    peers: Sequence[tuple[int, int]],
    nbytes: int,
    count: int,
    meet: Callable[[], None],
) -> float:
    """Send and receive messages, always some of them on their way.

    Args:
        comm: The ranks.
        peers: (to, from) of the first message and those that follow, over and over.
        nbytes: Of a message.
        count: Of messages.
        meet: Returns when both sides, or all, are here: the time of the slowest counts.

    Returns:
        Bytes/s sent.
    """
    there, back = np.zeros(nbytes, np.uint8), np.zeros((_IN_FLIGHT, nbytes), np.uint8)
    requests: deque[list[MPI.Request]] = deque()
    meet()
    start = time.perf_counter()
    for turn in range(count):
        to, source = peers[turn % len(peers)]
        if len(requests) == _IN_FLIGHT:
            MPI.Request.Waitall(requests.popleft())
        receive = comm.Irecv(back[turn % _IN_FLIGHT], source)
        requests.append([receive, comm.Isend(there, to)])
    for pair in requests:
        MPI.Request.Waitall(pair)
    meet()
    return nbytes * count / (time.perf_counter() - start)
