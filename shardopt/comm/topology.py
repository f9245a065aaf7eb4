"""Which ranks share a node, and whether they were started as one job at all."""

import os
import time
from dataclasses import dataclass
from typing import cast

from mpi4py import MPI

from shardopt.errors import LauncherError, RankFailureError
from shardopt.measure.cores import bound_to, count_cores

_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("PMI_SIZE", "MPICH's mpirun"),
    ("SLURM_STEP_NUM_TASKS", "Slurm's srun"),
)

_UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Topology:
    """The ranks of a job as nodes and lanes; communicators are shardopt's own duplicates.

    Attributes:
        comm: All ranks.
        node_comm: The ranks of this rank's node, in rank order.
        lane_comm: The ranks with this rank's ``node_rank``, one a node; there a rank is its node.
        places: For each rank of ``comm`` its (node, node_rank); nodes are counted from 0.
        hosts: For each rank of ``comm`` the name of its machine.
    """

    comm: MPI.Intracomm
    node_comm: MPI.Intracomm
    lane_comm: MPI.Intracomm
    places: tuple[tuple[int, int], ...]
    hosts: tuple[str, ...]

    @property
    def node(self) -> int:
        """The number of this rank's node."""
        return self.places[self.rank][0]

    @property
    def num_nodes(self) -> int:
        """Nodes in the job."""
        return 1 + max(node for node, _ in self.places)

    @property
    def rank(self) -> int:
        """This rank in ``comm``."""
        return self.comm.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.comm.size

    @property
    def node_rank(self) -> int:
        """This rank in ``node_comm``: the number of its lane."""
        return self.node_comm.rank

    @property
    def node_size(self) -> int:
        """Ranks on each node."""
        return self.node_comm.size

    @property
    def lane_ranks(self) -> list[int]:
        """The ranks of this rank's lane, by node."""
        ranks = [rank for rank, place in enumerate(self.places) if place[1] == self.node_rank]
        return sorted(ranks, key=lambda rank: self.places[rank])

    def free(self) -> None:
        """Release the communicators. Collective."""
        self.lane_comm.Free()
        self.node_comm.Free()
        self.comm.Free()


def make_topology(comm: MPI.Intracomm, share_node: bool | int, timeout_s: float) -> Topology:
    """Split ``comm`` into nodes and lanes.

    Nodes of unequal size cannot be cut into lanes: then, and without ``share_node``, every rank
    counts as a node of its own, which is slower but gives the same result.

    Collective: every rank of ``comm``.

    Args:
        comm: The ranks that train together.
        share_node: As in ``ShardPolicy``.
        timeout_s: Longest wait for the other ranks.

    Raises:
        LauncherError: The launcher started several processes that the MPI library sees as jobs of
            one.
        RankFailureError: Some rank did not come within ``timeout_s``.
    """
    require_one_job()
    _meet(comm, timeout_s)
    comm = comm.Dup()
    share_node = min(comm.allgather(_UNLIMITED if share_node is True else int(share_node)))
    node_comm = _split_machine(comm, share_node)
    if len(set(comm.allgather(node_comm.size))) > 1:
        node_comm.Free()
        node_comm = _split(comm, comm.rank)
    return arrange(comm, node_comm)


def arrange(comm: MPI.Intracomm, node_comm: MPI.Intracomm) -> Topology:
    """Number nodes by their lowest ranks, and lay lanes across them, as far as nodes have ranks.

    Collective: every rank of ``comm``.

    Args:
        comm: The ranks that train together.
        node_comm: Those of this rank's node, in rank order.
    """
    members = comm.allgather((node_comm.bcast(comm.rank), node_comm.rank))
    nodes = sorted({first for first, _ in members})
    places = tuple((nodes.index(first), rank) for first, rank in members)
    node, lane = places[comm.rank]
    lane_comm = _split(comm, lane, key=node)  # ranks need not be numbered node by node
    hosts = tuple(comm.allgather(MPI.Get_processor_name()))
    return Topology(comm, node_comm, lane_comm, places, hosts)


def _split_machine(comm: MPI.Intracomm, limit: int) -> MPI.Intracomm:
    """The ranks that can share memory, at most so many together."""
    machine = cast("MPI.Intracomm", comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank))
    node_comm = _split(machine, machine.rank // max(1, limit))
    machine.Free()
    return node_comm


def _split(comm: MPI.Intracomm, color: int, key: int = 0) -> MPI.Intracomm:
    return cast("MPI.Intracomm", comm.Split(color, key))  # of equal keys, in rank order


def _meet(comm: MPI.Intracomm, timeout_s: float) -> None:
    """Wait until all ranks build their optimizer: the calls that follow have no deadline."""
    request, start = comm.Ibarrier(), time.monotonic()
    while not request.Test():
        if time.monotonic() - start > timeout_s:
            raise RankFailureError(
                f"every rank must build the optimizer; got only some of {comm.size} within "
                f"{timeout_s} s. Build it on all ranks, or pass comm=... with those that do."
            )
        time.sleep(0.0001)


def require_one_job() -> None:
    """Refuse to train N copies of the same job of one rank.

    Raises:
        LauncherError: The launcher belongs to another MPI than the library in this process.
    """
    if MPI.COMM_WORLD.size > 1:
        return
    for variable, launcher in _LAUNCHERS:
        launched = os.environ.get(variable, "1")
        if launched.isdecimal() and int(launched) > 1:
            library = " ".join(MPI.Get_library_version().split(",")[0].split())
            raise LauncherError(
                f"launcher and MPI library must belong together; got {launcher} with {launched} "
                f"processes ({variable}={launched}) and the library {library!r}, which sees 1 "
                "rank. Start the job with the mpirun of this library: python -c "
                "'import sysconfig; print(sysconfig.get_path(\"scripts\"))' names its folder."
            )


def cores_per_rank(topology: Topology) -> int:
    """This rank's share of the cores it may run on. Collective: every rank."""
    mine = topology.hosts[topology.rank], bound_to()
    sharing = topology.comm.allgather(mine).count(mine)
    return max(1, count_cores() // sharing)
