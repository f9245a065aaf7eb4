"""The measurements of a job: memory, barriers, links and disks, with all ranks taking part."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mpi4py import MPI

from shardopt.cli.doctor.facts import Link, Speeds
from shardopt.cli.doctor.updates import measure_updates
from shardopt.cli.doctor.watch import Watch
from shardopt.comm.node_memory.limits import read_memory_room
from shardopt.comm.topology import Topology
from shardopt.measure.barrier import measure_barrier
from shardopt.measure.cores import cores_per_rank
from shardopt.measure.disk import measure_disk
from shardopt.measure.links import (
    LinkSpeed,
    Pair,
    measure_all_gather,
    measure_link,
    plan_messages,
)
from shardopt.measure.memory import ThreadedArrays, measure_addition
from shardopt.measure.messages import measure_messages
from shardopt.transport.mpi import MpiTransport

_DTYPE, _ITEMSIZE = "float32", 4
_NBYTES_PER_S = 256 << 20  # of budget: more than caches hold, but touching pages takes time
_MAX_SHARE = 0.25  # of the memory that is free: nothing may be killed for a measurement
_MIN_NUMEL = 512 << 10  # of a thread's part of an array
_MAX_THREADS = 16  # more would wait for Python's interpreter
_NUM_TRIES = 3  # for each link
_DISK_NBYTES_PER_S = 64 << 20  # of budget


@dataclass(frozen=True, slots=True)
class _RankSpeeds:
    """The measurements of one rank.

    Attributes:
        node: Its node.
        memory: Bytes/s of ``a += b`` on its threads.
        barrier_s: Seconds of a barrier of its node, or None for a single rank.
        links: The links that it led the measurement of.
        exchange: Bytes/s that it sent while all nodes sent to all.
        message_s: Seconds for each message that it sent; 0 if it sent none.
        updates: Bytes/s that updates moved; 0 if not measured.
        disk: Bytes/s that it wrote, or why it could not; None if it was not asked to.
    """

    node: int
    memory: float
    barrier_s: float | None
    links: list[Link]
    exchange: float
    message_s: float
    updates: float
    disk: float | str | None


def measure(
    topology: Topology, watch: Watch, budget_s: float, folder: Path | None = None
) -> Speeds | None:
    """Measure the job, and return the result on rank 0 and None elsewhere.

    Collective: every rank.

    Args:
        topology: The ranks; nodes may be of unequal size.
        watch: Ends the job if a measurement does not end.
        budget_s: Seconds that all measurements may take, approximately, beside those of disks.
        folder: A folder on the disk to measure, for a calibration, which takes the rate of updates
            too; None for neither.
    """
    node_nbytes = _affordable(topology, watch, int(budget_s * _NBYTES_PER_S))
    memory = measure_node_memory(topology, watch, node_nbytes, 0.2 * budget_s)
    with watch.together("the measurement of barriers", topology.comm):
        barrier_s = measure_barrier(topology.node_comm, 0.05 * budget_s)
    links = measure_links(topology, watch, 0.4 * budget_s)
    exchange = measure_exchange(topology, watch, links, 0.2 * budget_s)
    message_s = measure_message_cost(topology, watch, exchange, 0.1 * budget_s)
    disk = measure_node_disk(topology, watch, folder, int(budget_s * _DISK_NBYTES_PER_S))
    updates = 0.0
    if folder is not None:
        updates = measure_updates(topology, watch, node_nbytes, 0.2 * budget_s)
    mine = _RankSpeeds(topology.node, memory, barrier_s, links, exchange, message_s, updates, disk)
    with watch.together("the gathering of measurements", topology.comm):
        ranks = topology.comm.gather(mine)
    return None if ranks is None else _put_together(ranks)


def _affordable(topology: Topology, watch: Watch, node_nbytes: int) -> int:
    """Return the bytes to use on each node, little of what is free on the fullest. Collective."""
    with watch.together("the search for free memory", topology.comm):
        room = read_memory_room()
        most = node_nbytes if room is None else int(_MAX_SHARE * room.free_nbytes)
        least: int = topology.comm.allreduce(min(node_nbytes, most), MPI.MIN)
        return least


def _put_together(ranks: Sequence[_RankSpeeds]) -> Speeds:
    nodes = [
        [rank for rank in ranks if rank.node == node] for node in sorted({r.node for r in ranks})
    ]
    links = sorted((link for rank in ranks for link in rank.links), key=lambda link: link.nodes)
    sent = tuple(sum(rank.exchange for rank in node) for node in nodes)
    costs = tuple(max(rank.message_s for rank in node) for node in nodes)
    updates = tuple(sum(rank.updates for rank in node) for node in nodes)
    problem = next((rank.disk for rank in ranks if isinstance(rank.disk, str)), None)
    disks = [[rank.disk for rank in node if isinstance(rank.disk, float)] for node in nodes]
    return Speeds(
        memory=tuple(sum(rank.memory for rank in node) for node in nodes),
        barrier_s=tuple(node[-1].barrier_s for node in nodes),
        links=tuple(links),
        exchange=sent if len(nodes) > 1 else (),
        message_s=costs if len(nodes) > 1 else (),
        updates=updates if all(updates) else (),
        disk=tuple(map(sum, disks)) if problem is None and all(disks) else (),
        disk_problem=problem,
    )


def measure_node_memory(
    topology: Topology, watch: Watch, node_nbytes: int, budget_s: float
) -> float:
    """Measure this rank's share of its node's memory bandwidth while all ranks use it.

    Collective: every rank.

    Args:
        topology: The ranks.
        watch: Ends the job if the measurement does not end.
        node_nbytes: Memory to use on each node, in bytes.
        budget_s: Seconds to measure.

    Returns:
        Bytes/s.
    """
    with watch.together("the measurement of memory", topology.comm):
        num_threads = min(cores_per_rank(topology), _MAX_THREADS)
        numel = node_nbytes // (2 * _ITEMSIZE * topology.node_size)
        numel = max(numel, num_threads * _MIN_NUMEL)
        with ThreadedArrays(2, numel, _DTYPE, num_threads) as arrays:
            watch.meet(topology.comm)
            return measure_addition(arrays, budget_s)


def measure_links(topology: Topology, watch: Watch, budget_s: float) -> list[Link]:
    """Measure the links between neighbouring nodes, and return those that this rank led.

    The first ranks of the nodes measure, several times each, since other traffic can make a link
    only slower. Collective: every rank.
    """
    rounds = plan_rounds(topology.num_nodes)
    best: dict[tuple[int, int], LinkSpeed] = {}
    for pairs in rounds * _NUM_TRIES:
        with watch.together("the measurement of links between nodes", topology.comm):
            for nodes in pairs:
                if topology.node in nodes and topology.node_rank == 0:
                    pair = _make_pair(topology, nodes)
                    speed = measure_link(pair, budget_s / (len(rounds) * _NUM_TRIES))
                    best[nodes] = speed.better_of(best.get(nodes, speed))
    return [
        Link(nodes, speed.latency_s, speed.nbytes_per_s)
        for nodes, speed in best.items()
        if nodes[0] == topology.node
    ]


def _make_pair(topology: Topology, nodes: tuple[int, int]) -> Pair:
    leads = nodes[0] == topology.node
    peer = topology.places.index((nodes[1] if leads else nodes[0], 0))
    return Pair(topology.comm, peer, leads)


def plan_rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Pair each node with the next, and the last with the first, in rounds of disjoint pairs."""
    if num_nodes < 3:
        return [[(0, 1)]] if num_nodes == 2 else []
    ring = [(node, (node + 1) % num_nodes) for node in range(num_nodes)]
    odd_one = [ring.pop()] if num_nodes % 2 else []
    return [pairs for pairs in (ring[0::2], ring[1::2], odd_one) if pairs]


def measure_exchange(
    topology: Topology, watch: Watch, links: Sequence[Link], budget_s: float
) -> float:
    """Send from every node to every other at once, on as many lanes as all nodes have.

    Collective: every rank.

    Args:
        topology: The ranks.
        watch: Ends the job if the measurement does not end.
        links: The links that this rank has measured; they tell how much to send.
        budget_s: Seconds that it may take, approximately.

    Returns:
        Bytes/s that this rank sent.
    """
    if topology.num_nodes == 1:
        return 0.0
    with watch.together("the measurement of all links at once", topology.comm):
        num_lanes = topology.comm.allreduce(topology.node_size, MPI.MIN)
        slowest = min((link.nbytes_per_s for link in links), default=float("inf"))
        nbytes_per_s = topology.comm.allreduce(slowest, MPI.MIN) / num_lanes
        color = topology.node_rank if topology.node_rank < num_lanes else MPI.UNDEFINED
        lane = cast("MPI.Intracomm", topology.comm.Split(color, topology.rank))
        if lane == MPI.COMM_NULL:
            return 0.0
        sent = measure_all_gather(lane, plan_messages(nbytes_per_s, budget_s))
        lane.Free()
        return sent


def measure_message_cost(
    topology: Topology, watch: Watch, exchange: float, budget_s: float
) -> float:
    """Send small messages along the lanes that all nodes have. Collective: every rank.

    Args:
        topology: The ranks.
        watch: Ends the job if the measurement does not end.
        exchange: Bytes/s that this rank sent in large messages.
        budget_s: Seconds that it may take, approximately.

    Returns:
        Seconds for each message that this rank sent, or 0 if it sent none.
    """
    if topology.num_nodes == 1:
        return 0.0
    with watch.together("the measurement of small messages", topology.comm):
        if topology.node_rank >= topology.comm.allreduce(topology.node_size, MPI.MIN):
            return 0.0
        transport = MpiTransport(topology, number=0)
        found_s = measure_messages(transport, topology.lane_comm, exchange, budget_s)
        transport.close()
        return found_s


def measure_node_disk(
    topology: Topology, watch: Watch, folder: Path | None, node_nbytes: int
) -> float | str | None:
    """Write on all ranks at once. Collective: every rank.

    Args:
        topology: The ranks.
        watch: Ends the job if the measurement does not end.
        folder: The folder to write in; None to write nothing.
        node_nbytes: Bytes to write on each node.

    Returns:
        Bytes/s that this rank wrote, or why it could not; None without a folder.
    """
    if folder is None:
        return None
    with watch.together("the measurement of disks", topology.comm):
        try:
            return measure_disk(folder, node_nbytes // topology.node_size)
        except OSError as error:
            return f"{error.strerror} in {folder}"
