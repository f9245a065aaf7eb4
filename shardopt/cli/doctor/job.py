"""The resources of a job's ranks and nodes, and the ranks that share memory."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from mpi4py import MPI

from shardopt.backends.cuda.peers import Peers
from shardopt.cli.doctor.facts import Node, Rank, RankGpu
from shardopt.cli.doctor.gpus import count_gpus, describe_gpus
from shardopt.cli.doctor.watch import Watch
from shardopt.comm.flags import NodeFlags
from shardopt.comm.node_memory.arena import Arena
from shardopt.comm.node_memory.limits import (
    MemoryRoom,
    read_address_room,
    read_memory_room,
    read_promise_room,
)
from shardopt.comm.node_memory.mpi_shm import mpi_shm_nbytes, read_mpi_shm_size
from shardopt.comm.node_memory.probing import why_no_pagemap, why_no_userfaultfd
from shardopt.comm.node_memory.writes import VARIABLE, write_tracking
from shardopt.comm.topology import Topology, arrange
from shardopt.errors import HyperparamsError, SharedMemoryError
from shardopt.measure.cores import QUOTA, bound_to, cores_per_rank, read_quota

_CPUSET = QUOTA.with_name("cpuset.cpus.effective")


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
        problems = node_comm.allgather(try_sharing(topology))
    gpu, peers = describe_gpus(topology, watch)
    with watch.together("the description of the ranks", comm):
        view = _View(_describe_rank(topology, gpu), _describe_node(topology, problems, peers))
        views = comm.gather(view) or []
    nodes = {view.rank.node: view.node for view in views}
    return tuple(view.rank for view in views), tuple(nodes[node] for node in sorted(nodes))


def try_sharing(topology: Topology) -> str | None:
    """Share memory within the node, and describe the problem if there is one.

    Collective: every rank of the node.
    """
    comm = topology.node_comm
    try:
        flags = NodeFlags(Arena(comm), 1)
    except MPI.Exception as error:
        return f"got {error.error_string}"
    except (OSError, SharedMemoryError) as error:
        return f"got {error}"
    numbers = np.array(comm.allgather(topology.rank))
    flags.mine[0] = 1 + topology.rank
    flags.publish()
    comm.Barrier()
    flags.acquire()
    unseen = numbers[flags.all[:, 0] != 1 + numbers].tolist()
    comm.Barrier()
    if not unseen:
        return None
    return f"got memory in which rank {topology.rank} does not see what rank {unseen[0]} stores"


def _describe_rank(topology: Topology, gpu: RankGpu | None) -> Rank:
    return Rank(
        rank=topology.rank,
        node=topology.node,
        cores=tuple(sorted(bound_to())),
        num_cores=cores_per_rank(topology),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        namespaces=_read_namespaces(),
        gpu=gpu,
    )


def _read_namespaces() -> tuple[str, ...]:
    try:
        return tuple(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "mnt"))
    except OSError:
        return ()


def _describe_node(topology: Topology, problems: Sequence[str | None], peers: Peers | None) -> Node:
    room = read_memory_room() or MemoryRoom(0, None)
    tracking, reason = _describe_tracking()
    return Node(
        host=platform.node(),
        ranks=tuple(topology.node_comm.allgather(topology.rank)),
        num_cores=min(_count_node_cores(_CPUSET), read_quota(QUOTA)),
        free_nbytes=room.free_nbytes,
        memory_limit=room.limit,
        address_nbytes=read_address_room(),
        promise_nbytes=read_promise_room(),
        shm_nbytes=read_mpi_shm_size(),
        mpi_shm_nbytes=mpi_shm_nbytes(MPI.Get_library_version(), topology.node_comm.size),
        tracking=tracking,
        tracking_reason=reason,
        num_gpus=count_gpus(),
        sharing_problem=next(filter(None, problems), None),
        peers=peers,
    )


def _describe_tracking() -> tuple[str | None, str | None]:
    """Return the way to find written weights, and why no faster way is used."""
    try:
        name = write_tracking().name
    except HyperparamsError as error:
        return None, str(error)
    if os.environ.get(VARIABLE):
        return name, f"{VARIABLE} asks for it."
    reasons = {"pagemap": (why_no_userfaultfd,), "compare": (why_no_userfaultfd, why_no_pagemap)}
    found = (reason() for reason in reasons.get(name, ()))
    return name, " ".join(filter(None, found)) or None


def _count_node_cores(cpuset: Path) -> int:
    """Count the cores in a container's cpuset: ``0-3,8`` are five."""
    try:
        ends = [part.split("-") for part in cpuset.read_text().strip().split(",")]
        return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
    except (OSError, ValueError):
        return os.cpu_count() or 1
