"""The resources of a job's ranks and nodes, and the ranks that share memory."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from mpi4py import MPI

from shardopt.cli.doctor.facts import Node, Rank
from shardopt.cli.doctor.watch import Watch
from shardopt.comm.flags import NodeFlags
from shardopt.comm.shared_memory import SHARED_MEMORY_FOLDER
from shardopt.comm.topology import Topology, arrange
from shardopt.measure.cores import QUOTA, bound_to, cores_per_rank, read_quota

_CPUSET = QUOTA.with_name("cpuset.cpus.effective")
_MEMORY_LIMIT = QUOTA.with_name("memory.max")


@dataclass(frozen=True, slots=True)
class _View:
    """One rank's report to rank 0, about itself and its node."""

    rank: Rank
    node: Node


def split(comm: MPI.Intracomm, watch: Watch) -> Topology:
    """Find the nodes as they are, which may be of unequal size, unlike those of training.

    Collective: every rank.
    """
    with watch.together("the search for nodes", comm):
        comm = comm.Dup()
        node_comm = cast("MPI.Intracomm", comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank))
        return arrange(comm, node_comm)


def describe_job(topology: Topology, watch: Watch) -> tuple[tuple[Rank, ...], tuple[Node, ...]]:
    """Gather a description of all ranks and nodes on rank 0; other ranks get nothing.

    Collective: every rank.
    """
    comm, node_comm = topology.comm, topology.node_comm
    with watch.together("a test of the nodes' shared memory", comm):
        window_problem = next(filter(None, node_comm.allgather(try_window(topology))), None)
    with watch.together("the description of the ranks", comm):
        view = _View(_describe_rank(topology), _describe_node(topology, window_problem))
        views = comm.gather(view) or []
    nodes = {view.rank.node: view.node for view in views}
    return tuple(view.rank for view in views), tuple(nodes[node] for node in sorted(nodes))


def try_window(topology: Topology) -> str | None:
    """Share memory within the node, and describe the problem if there is one.

    Collective: every rank of the node.
    """
    comm = topology.node_comm
    try:
        flags = NodeFlags(comm, 1)
    except MPI.Exception as error:
        return f"got {error.error_string}"
    numbers = np.array(comm.allgather(topology.rank))
    flags.mine[0] = 1 + topology.rank
    flags.publish()
    comm.Barrier()
    flags.acquire()
    unseen = numbers[flags.all[:, 0] != 1 + numbers].tolist()
    comm.Barrier()
    flags.free()
    if not unseen:
        return None
    return f"got memory in which rank {topology.rank} does not see what rank {unseen[0]} stores"


def _describe_rank(topology: Topology) -> Rank:
    return Rank(
        rank=topology.rank,
        node=topology.node,
        cores=tuple(sorted(bound_to())),
        num_cores=cores_per_rank(topology),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _describe_node(topology: Topology, window_problem: str | None) -> Node:
    shm_nbytes, shm_free_nbytes = _measure_folder(SHARED_MEMORY_FOLDER)
    return Node(
        host=platform.node(),
        ranks=tuple(topology.node_comm.allgather(topology.rank)),
        num_cores=min(_count_node_cores(_CPUSET), read_quota(QUOTA)),
        free_nbytes=_free_nbytes(),
        shm_nbytes=shm_nbytes,
        shm_free_nbytes=shm_free_nbytes,
        num_gpus=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        window_problem=window_problem,
    )


def _measure_folder(path: str) -> tuple[int, int] | tuple[None, None]:
    """Return the size and the free space of a file system in bytes, or None if there is none."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None, None
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def _count_node_cores(cpuset: Path) -> int:
    """Count the cores in a container's cpuset: ``0-3,8`` are five."""
    try:
        ends = [part.split("-") for part in cpuset.read_text().strip().split(",")]
        return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
    except (OSError, ValueError):
        return os.cpu_count() or 1


def _free_nbytes() -> int:
    """Return the free memory of this node or container in bytes; 0 if it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free_kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        limit = _MEMORY_LIMIT.read_text() if _MEMORY_LIMIT.exists() else ""
    except (OSError, StopIteration):
        return 0
    nbytes = 1024 * int(free_kib)
    return min(nbytes, int(limit)) if limit.strip().isdecimal() else nbytes
