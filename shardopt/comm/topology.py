"""The nodes and lanes of a job, and the check that its ranks were started as one job."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from mpi4py import MPI

from shardopt.comm.failure import FailurePolicy
from shardopt.comm.waiting import CONSTRUCTION, deadline, wait_until
from shardopt.errors import LauncherError, RankFailureError

_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("PMI_SIZE", "MPICH's mpirun"),
    ("SLURM_STEP_NUM_TASKS", "Slurm's srun"),
)

_UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Topology:
    """The nodes and lanes of a job, with communicators of shardopt's own.

    A lane is the set of ranks with the same ``node_rank``, one on each node (NCCL: rail).

    Attributes:
        comm: All ranks.
        node_comm: The ranks of this rank's node, in rank order.
        lane_comm: The ranks of this rank's lane; their ranks there are the numbers of their nodes.
        places: The (node, node_rank) of each rank of ``comm``; nodes are counted from 0.
        hosts: The name of each rank's machine.
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
        """Number of nodes."""
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
        """Number of ranks on each node."""
        return self.node_comm.size

    @property
    def node_ranks(self) -> list[int]:
        """The ranks of this rank's node, by their ranks in ``node_comm``."""
        ranks = [rank for rank, place in enumerate(self.places) if place[0] == self.node]
        return sorted(ranks, key=self.places.__getitem__)

    @property
    def lane_ranks(self) -> list[int]:
        """The ranks of this rank's lane, by node."""
        ranks = [rank for rank, place in enumerate(self.places) if place[1] == self.node_rank]
        return sorted(ranks, key=self.places.__getitem__)

    def free(self) -> None:
        """Release the communicators. Collective."""
        self.lane_comm.Free()
        self.node_comm.Free()
        self.comm.Free()


def node_limit(share_node: bool | int) -> int:
    """Return the highest number of ranks that may share a node's memory.

    Args:
        share_node: As in ``ShardPolicy``.
    """
    return _UNLIMITED if share_node is True else int(share_node)


def make_topology(
    comm: MPI.Intracomm,
    share_node: bool | int,
    timeout_s: float,
    failure: FailurePolicy,
    can_share: Callable[[MPI.Intracomm], bool] = lambda machine: True,
) -> Topology:
    """Split ``comm`` into nodes and lanes.

    If nodes have unequal sizes, lanes do not exist. Then, and without ``share_node``, every rank
    counts as a node of its own, which is slower but gives the same result.

    Collective: every rank of ``comm``.

    Args:
        comm: The ranks that train together.
        share_node: As in ``ShardPolicy``.
        timeout_s: Longest wait for the other ranks.
        failure: What to do if they have all begun, but do not complete this.
        can_share: Called on all ranks of a machine, which become nodes of their own unless it
            returns True on all of them.

    Raises:
        LauncherError: The launcher started several processes, each of which is a job of one rank
            to the MPI library.
        RankFailureError: Not all ranks made this call within ``timeout_s``.
    """
    require_one_job()
    _meet(comm, timeout_s)
    with deadline(timeout_s, CONSTRUCTION, failure):
        comm = comm.Dup()
        limit = min(comm.allgather(node_limit(share_node)))
        node_comm = _split_machine(comm, limit, can_share)
        if len(set(comm.allgather(node_comm.size))) > 1:
            node_comm.Free()
            node_comm = _split(comm, comm.rank)
        return arrange(comm, node_comm)


def arrange(comm: MPI.Intracomm, node_comm: MPI.Intracomm) -> Topology:
    """Number the nodes by their lowest ranks, and make lanes across those that have enough ranks.

    Collective: every rank of ``comm``.

    Args:
        comm: The ranks that train together.
        node_comm: The ranks of this rank's node, in rank order.
    """
    members = comm.allgather((node_comm.bcast(comm.rank), node_comm.rank))
    nodes = sorted({first for first, _ in members})
    places = tuple((nodes.index(first), rank) for first, rank in members)
    node, lane = places[comm.rank]
    lane_comm = _split(comm, lane, key=node)  # ranks need not be numbered node by node
    hosts = tuple(comm.allgather(MPI.Get_processor_name()))
    return Topology(comm, node_comm, lane_comm, places, hosts)


def _split_machine(
    comm: MPI.Intracomm, limit: int, can_share: Callable[[MPI.Intracomm], bool]
) -> MPI.Intracomm:
    """Return the ranks that share memory with this one, at most ``limit`` together."""
    machine = cast("MPI.Intracomm", comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank))
    if not machine.allreduce(can_share(machine), op=MPI.LAND):
        limit = 1
    node_comm = _split(machine, machine.rank // max(1, limit))
    machine.Free()
    return node_comm


def _split(comm: MPI.Intracomm, color: int, key: int = 0) -> MPI.Intracomm:
    return cast("MPI.Intracomm", comm.Split(color, key))  # equal keys: in rank order


def _meet(comm: MPI.Intracomm, timeout_s: float) -> None:
    """Wait until all ranks build their optimizer, as the calls that follow cannot be given up.

    A rank that comes when others have given up still completes the first barrier, which they have
    entered. The second one is entered only by ranks that have completed the first.

    Raises:
        RankFailureError: Some ranks do not come, or have given up.
    """

    def check(waited_s: float) -> None:
        if waited_s > timeout_s:
            raise RankFailureError(
                f"timed out after {timeout_s:g} s: only some of {comm.size} ranks build the "
                "optimizer. Build it on all ranks, or pass comm=... with those that do."
            )

    for _ in range(2):
        wait_until(comm.Ibarrier().Test, check)


def require_one_job() -> None:
    """Raise unless the processes of the launcher are ranks of one job.

    Raises:
        LauncherError: The launcher belongs to another MPI than the library in this process, so
            each process would train on its own.
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
