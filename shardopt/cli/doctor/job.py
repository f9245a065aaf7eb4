"""What the ranks of a job have, and which of them share memory."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from mpi4py import MPI

from shardopt.cli.doctor.facts import Node, Rank
from shardopt.cli.doctor.watch import Watch
from shardopt.comm.shared_memory import SHARED_MEMORY_FOLDER, Window
from shardopt.comm.topology import Topology, arrange, cores_per_rank
from shardopt.measure.cores import QUOTA, bound_to, read_quota

_CPUSET = QUOTA.with_name("cpuset.cpus.effective")
_MEMORY_LIMIT = QUOTA.with_name("memory.max")
_LINE_NUMEL = 8  # a cache line of int64 for each rank


@dataclass(frozen=True, slots=True)
class _View:
    """What a rank tells rank 0: of itself, and of its node."""

    rank: Rank
    node: Node


def split(comm: MPI.Intracomm, watch: Watch) -> Topology:
    """Find the nodes as they are: other than those of training they may be of unequal sizes.

    Collective.
    """
    with watch.together("the search for nodes", comm):
        comm = comm.Dup()
        node_comm = cast("MPI.Intracomm", comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank))
        return arrange(comm, node_comm)


def describe_job(topology: Topology, watch: Watch) -> tuple[tuple[Rank, ...], tuple[Node, ...]]:
    """Gather what ranks and nodes have on rank 0; others get nothing. Collective."""
    comm, node_comm = topology.comm, topology.node_comm
    with watch.together("a test of the nodes' shared memory", comm):
        window_problem = next(filter(None, node_comm.allgather(try_window(topology))), None)
    with watch.together("the gathering of what the ranks have", comm):
        view = _View(_describe_rank(topology), _describe_node(topology, window_problem))
        views = comm.gather(view) or []
    nodes = {view.rank.node: view.node for view in views}
    return tuple(view.rank for view in views), tuple(nodes[node] for node in sorted(nodes))


def try_window(topology: Topology) -> str | None:
    """Share a window within the node, and say what is wrong with it, if anything. Collective."""
    comm = topology.node_comm
    try:
        window = Window(comm, 8 * _LINE_NUMEL)
    except MPI.Exception as error:
        return f"got {error.error_string}"
    lines = window.memory.view(np.int64).reshape(-1, _LINE_NUMEL)
    numbers = np.array(comm.allgather(topology.rank))
    lines[topology.node_rank] = 1 + topology.rank
    window.sync()
    comm.Barrier()
    window.sync()
    unseen = numbers[lines[:, 0] != 1 + numbers]
    comm.Barrier()
    del lines
    window.free()
    if not unseen.size:
        return None
    return f"got a window in which rank {topology.rank} does not see what rank {unseen[0]} stores"


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
    """Bytes of a file system, all and free; None where there is none."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None, None
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def _count_node_cores(cpuset: Path) -> int:
    """Count the cores that a container leaves to its processes: ``0-3,8`` are five."""
    try:
        ends = [part.split("-") for part in cpuset.read_text().strip().split(",")]
        return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
    except (OSError, ValueError):
        return os.cpu_count() or 1


def _free_nbytes() -> int:
    """Memory that this node, or this container, can still hand out; 0 where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free_kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        limit = _MEMORY_LIMIT.read_text() if _MEMORY_LIMIT.exists() else ""
    except (OSError, StopIteration):
        return 0
    nbytes = 1024 * int(free_kib)
    return min(nbytes, int(limit)) if limit.strip().isdecimal() else nbytes
