"""Communicators, memory and failure detection that the optimizers on a communicator share.

[Note: optimizers share communicators]
An MPI library has room for some 2,000 communicators, so optimizers do not make their own. They
share those of a ``RankGroup``, which is made with the first optimizer on a communicator and kept
there as an attribute. It is released when the user frees the communicator; MPI_Finalize takes the
rest.

Messages of different optimizers cannot be taken for each other. Optimizers are numbered in the
order in which they are built, which is the same on every rank. The number is part of the digest
that ranks compare at the start of each call (``Consensus.agree``) and of the tag of each bucket's
messages (``MpiTransport``), as several progress threads may send at once. All other communication
is in the order of calls, in the thread that makes them, and only one thread may do so at a time.
"""

import functools
import os
import threading

from mpi4py import MPI

from shardopt.comm.exit_hook import ExitHook, mpi_is_usable
from shardopt.comm.failure import FailurePolicy
from shardopt.comm.liveness import FailureDetector
from shardopt.comm.node_memory.arena import Arena, can_share
from shardopt.comm.topology import Topology, make_topology
from shardopt.comm.waiting import CONSTRUCTION, deadline


class RankGroup:
    """The ranks that train together, with all that their optimizers share.

    Collective: construction and every method.

    Args:
        topology: The ranks; their communicators belong to this group from now on.

    Attributes:
        topology: As given.
        arena: The memory of this rank's node.
        detector: Finds out which ranks are missing. Its ``arrivals`` count the collectives of all
            optimizers, and this rank leaves them when it exits.
        in_use: Held by the thread that waits for other ranks.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.arena = Arena(topology.node_comm)
        self.detector = FailureDetector(topology, self.arena)
        self.in_use = threading.Lock()
        self._exit = ExitHook(self, self.detector.arrivals.leave)
        self._num_open = 0
        self._is_abandoned = False

    def add_optimizer(self) -> None:
        """Count one more optimizer that is open."""
        self._num_open += 1

    def remove_optimizer(self) -> None:
        """Count one less; the last one releases the group if the communicator is freed already."""
        self._num_open -= 1
        if self._is_abandoned and not self._num_open:
            self._free()

    def abandon(self) -> None:
        """Release the group, or leave that to the last optimizer that is still open.

        Optimizers that are dropped without ``close()`` stay open: ranks may drop them at different
        times. Their communicators then last until the end of the job.
        """
        self._is_abandoned = True
        if not self._num_open:
            self._free()

    def _free(self) -> None:
        self._exit.cancel()
        self.detector.free()
        self.topology.free()


class RankGroups:
    """The groups of one communicator, by the highest number of ranks that share a node's memory.

    Attributes:
        by_limit: The groups; they are in the same order on every rank.
        num_optimizers: Optimizers built so far, which is the number of the last one.
    """

    def __init__(self) -> None:
        self.by_limit: dict[int, RankGroup] = {}
        self.num_optimizers = 0
        self._pid = os.getpid()

    @classmethod
    def of(cls, comm: MPI.Intracomm) -> "RankGroups":
        """Return the groups of a communicator, none at first."""
        groups = comm.Get_attr(_keyval())
        if groups is None:
            groups = cls()
            comm.Set_attr(_keyval(), groups)
        assert isinstance(groups, cls)
        return groups

    @property
    def first(self) -> RankGroup | None:
        """The group that was made first."""
        return next(iter(self.by_limit.values()), None)

    def abandon(self) -> None:
        """Release the groups, as the user frees the communicator. Collective."""
        if mpi_is_usable(self._pid):
            for group in self.by_limit.values():
                group.abandon()


def make_group(
    comm: MPI.Intracomm, share_node: bool | int, timeout_s: float, failure: FailurePolicy
) -> RankGroup:
    """Make the communicators of a group, and what detects failures.

    Collective: every rank of ``comm``.

    Args:
        comm: The ranks that train together.
        share_node: As in ``ShardPolicy``.
        timeout_s: Longest wait for the other ranks.
        failure: What to do when it is exceeded.

    Raises:
        LauncherError: As ``make_topology`` does.
        RankFailureError: Likewise.
    """
    topology = make_topology(comm, share_node, timeout_s, failure, can_share)
    with deadline(timeout_s, CONSTRUCTION, failure):
        return RankGroup(topology)


@functools.cache
def _keyval() -> int:
    """Return MPI's key of the attribute; MPI itself never copies it to a duplicate."""
    return MPI.Comm.Create_keyval(delete_fn=_on_delete)


def _on_delete(comm: MPI.Comm, keyval: int, groups: RankGroups) -> None:
    if comm not in (MPI.COMM_WORLD, MPI.COMM_SELF):  # those are not freed but finalized
        groups.abandon()
