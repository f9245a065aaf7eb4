"""Groups of ranks with the communicators that they work with, while all other ranks sleep."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from mpi4py import MPI

from benchmarks.cases.scaling.groups import Group, plan_groups
from benchmarks.contenders.internals import topology_of
from benchmarks.contenders.torch_env import new_group
from benchmarks.harness.timing import meet_asleep

_T = TypeVar("_T")


@dataclass(frozen=True)
class Team(Group):
    """A group, as one of all ranks sees it.

    Attributes:
        world: All ranks of the job.
        comm: Those of the group; ``MPI.COMM_NULL`` on all others.
        torch_group: Likewise for torch; None without it.
    """

    world: MPI.Intracomm
    comm: MPI.Intracomm
    torch_group: Any

    def run(self, work: Callable[[MPI.Intracomm], _T]) -> _T | None:
        """Do some work on the ranks of the team, and return what it returned on each of them.

        A rank that raises ends the job, so that the others need not be told.

        Collective: every rank of the job. Those of no use sleep meanwhile, and get None.
        """
        returned = work(self.comm) if self.comm != MPI.COMM_NULL else None
        meet_asleep(self.world)
        return returned

    def announce(self, mode: str) -> None:
        """Print what is going to be measured, once."""
        if self.world.rank == 0:
            words = f"{len(self.ranks)} of {self.world.size} ranks on {self.num_nodes} node(s)"
            print(f"{mode}: {words}", file=sys.stderr, flush=True)

    def settings(self) -> dict[str, Any]:
        """Return what tells the results of this team from those of others."""
        return {"nodes": self.num_nodes, "by": " and ".join(self.by)}


@contextmanager
def teams_of(
    world: MPI.Intracomm,
    sizes: Sequence[int],
    share_node: bool | int,
    uses_torch: bool,
) -> Iterator[list[Team]]:
    """Yield the teams of a job, the smallest first. Collective: every rank, on its way in and out.

    Args:
        world: All ranks of the job.
        sizes: As in ``plan_groups``.
        share_node: As in ``ShardPolicy``.
        uses_torch: Whether torch has a process group of all ranks.
    """
    with topology_of(world, share_node) as topology:
        groups = plan_groups(topology.places, sizes)
    teams = []
    for group in groups:
        color = 0 if world.rank in group.ranks else MPI.UNDEFINED
        comm = cast("MPI.Intracomm", world.Split(color))
        torch_group = new_group(group.ranks) if uses_torch else None
        teams.append(Team(group.ranks, group.num_nodes, group.by, world, comm, torch_group))
    yield teams
    for team in teams:
        if team.comm != MPI.COMM_NULL:
            team.comm.Free()
