"""Failure detection: how far each rank has come, which ranks are missing, and how to say so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mpi4py import MPI

from shardopt.comm.flags import NodeFlags
from shardopt.comm.node_memory.arena import Arena
from shardopt.comm.topology import Topology

_ARRIVALS, _STEP, _LEFT, _NODE_MEETING, _NUM_FIELDS = 0, 1, 2, 3, 4
_COLLECTIVE = 0  # in the place of the number of a meeting on the node

_IF_SLOW = (
    "Check whether a process or a host died or hangs, and that all ranks make the same calls "
    "equally often; raise policy.timeout_s if they are only slow."
)
_IF_ENDED = "Check why the process ended, and that all ranks make the same calls equally often."


class Where(NamedTuple):
    """The place in the program that a wait belongs to."""

    step: int
    phase: str

    def __str__(self) -> str:
        return f"step {self.step} ({self.phase})"

    def trace_args(self) -> Mapping[str, object]:
        """Return what a trace shows of a wait."""
        return {"step": self.step, "phase": self.phase}


@dataclass(frozen=True)
class Failure:
    """A failure of other ranks, as far as this rank can tell.

    Attributes:
        ranks: The ranks concerned.
        message: What happened, where, and what to do.
    """

    ranks: Sequence[int]
    message: str


class Arrivals:
    """How many collectives each rank of this node has entered, readable without its help.

    A meeting of the ranks of a node without MPI, which all of them enter in the same calls, counts
    as a collective.

    Collective over the node: construction.

    Args:
        topology: The ranks.
        arena: The memory of the node.
    """

    def __init__(self, topology: Topology, arena: Arena) -> None:
        self._ranks = topology.node_ranks
        self._flags = NodeFlags(arena, _NUM_FIELDS)

    def arrive(self, step: int, node_meeting: int = _COLLECTIVE) -> None:
        """Note that this rank enters a collective in a step.

        Args:
            step: Its number.
            node_meeting: The number of the optimizer whose ranks on the node meet without MPI.
        """
        self._flags.mine[_STEP] = step
        self._flags.mine[_NODE_MEETING] = node_meeting
        self._flags.publish()
        self._flags.mine[_ARRIVALS] += 1
        self._flags.publish()

    def withdraw(self) -> None:
        """Take back the last arrival, as this rank has left without having finished."""
        self._flags.mine[_ARRIVALS] -= 1
        self._flags.publish()

    def leave(self) -> None:
        """Note that this rank leaves the job: nobody needs to wait for it."""
        self._flags.mine[_LEFT] = 1
        self._flags.publish()

    def behind(self) -> dict[int, int]:
        """Return the ranks of this node that have entered fewer collectives, with their steps."""
        self._flags.acquire()
        flags = self._flags.all
        is_behind = flags[:, _ARRIVALS] < self._flags.mine[_ARRIVALS]
        return {self._ranks[i]: int(flags[i, _STEP]) for i in is_behind.nonzero()[0]}

    def elsewhere(self) -> list[int]:
        """Return the ranks of this node that have entered another collective instead of this one.

        Ranks that have been here and gone on are among them.
        """
        self._flags.acquire()
        flags, mine = self._flags.all, self._flags.mine
        is_ahead = flags[:, _ARRIVALS] > mine[_ARRIVALS]
        is_other = flags[:, _NODE_MEETING] != mine[_NODE_MEETING]
        is_elsewhere = is_ahead | (flags[:, _ARRIVALS] == mine[_ARRIVALS]) & is_other
        return [self._ranks[i] for i in is_elsewhere.nonzero()[0]]

    def left(self) -> list[int]:
        """Return the ranks of this node that have left the job."""
        self._flags.acquire()
        return [self._ranks[i] for i in self._flags.all[:, _LEFT].nonzero()[0]]


class LivenessProbe:
    """Asks all ranks, on any node, what they are waiting for.

    Ranks answer only while they themselves wait, so silence means computing, hung or dead. A
    collective could not tell which rank that is, as it needs every one of them.

    Collective: construction and ``free``.

    Args:
        comm: All ranks.

    Attributes:
        answers: The places where the ranks that have answered wait, by rank.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm.Dup()
        self._number = 0  # of questions asked, to tell an answer to an old one
        self._has_asked = False
        self._sends: list[Any] = []  # kept, as MPI reads from them
        self.answers: dict[int, str] = {}

    def begin(self) -> None:
        """Begin a wait, about which nobody has been asked yet."""
        self.answers = {}
        self._has_asked = False

    def poll(self, place: str, *, ask: bool) -> None:
        """Receive questions and answers, and answer the questions.

        Args:
            place: Where this rank waits.
            ask: Ask the others, unless that has been done since ``begin``.
        """
        status = MPI.Status()
        while self._comm.iprobe(status=status):
            rank = status.source
            number, answer = self._comm.recv(source=rank)
            if answer is None:
                self._send((number, place), rank)
            elif number == self._number and self._has_asked:
                self.answers[rank] = answer
        if ask and not self._has_asked:
            self._has_asked = True
            self._number += 1
            for rank in range(self._comm.size):
                if rank != self._comm.rank:
                    self._send((self._number, None), rank)

    def free(self) -> None:
        """Release the communicator. Collective."""
        self._comm.Free()

    def _send(self, message: tuple[int, str | None], rank: int) -> None:
        self._sends = [request for request in self._sends if not request.test()[0]]
        self._sends.append(self._comm.isend(message, rank))


class FailureDetector:
    """Finds out which ranks a wait that does not end is waiting for.

    Ranks of this node are judged by their ``Arrivals``, others by what they answer to the
    ``LivenessProbe``.

    Collective: construction and ``free``.

    Args:
        topology: The ranks.
        arena: The memory of the node.

    Attributes:
        arrivals: How far the ranks of this node have come.
    """

    def __init__(self, topology: Topology, arena: Arena) -> None:
        self.arrivals = Arrivals(topology, arena)
        self._topology = topology
        self._probe = LivenessProbe(topology.comm)
        self._met_in_step = 0  # the last step in which every rank has entered a collective

    def met(self, step: int) -> None:
        """Note that a collective has completed, which needs every rank."""
        self._met_in_step = step

    def begin(self) -> None:
        """Begin a wait."""
        self._probe.begin()

    def check(
        self, where: Where, waited_s: float, timeout_s: float, awaited: Sequence[int]
    ) -> Failure | None:
        """Return the failure that this wait has met with, or None while there is hope.

        Args:
            where: What the wait belongs to.
            waited_s: How long it has lasted.
            timeout_s: How long it may last.
            awaited: The ranks that it depends on, if they are known.
        """
        self._probe.poll(str(where), ask=waited_s > timeout_s / 2)
        left = self.arrivals.left()  # before the others: these arrive nowhere any more
        behind = self.arrivals.behind()
        if missing := [rank for rank in left if rank in behind or rank in awaited]:
            text = f"{self._last_seen(missing, behind)} left the job, but {where} needs every rank"
            return Failure(missing, f"{text}. {_IF_ENDED}")
        if waited_s >= timeout_s:
            return self._describe_timeout(where, waited_s, awaited, behind)
        return None

    def describe_lost(self, where: Where, error: MPI.Exception, awaited: Sequence[int]) -> Failure:
        """Describe an error of MPI, any call of which may be the first to notice a failure.

        Args:
            where: What the call belongs to.
            error: MPI's error.
            awaited: The ranks that the call depends on, if they are known.
        """
        if lost := self._failed_ranks():
            text = f"lost {self._name(lost)} in {where}: {error}"
            return Failure(lost, f"{text}. Check whether the process or the host died.")
        ranks = awaited or self._silent(self.arrivals.behind(), ())
        text = f"MPI failed in {where} while waiting for {self._name(ranks) or 'other ranks'}"
        return Failure(ranks, f"{text}: {error}. Check whether a process or a host died.")

    def free(self) -> None:
        """Release what is shared. Collective."""
        self._probe.free()

    def _describe_timeout(
        self, where: Where, waited_s: float, awaited: Sequence[int], behind: Mapping[int, int]
    ) -> Failure:
        answers = self._probe.answers
        silent = self._silent(behind, awaited)
        elsewhere = [
            rank
            for rank in awaited or behind or answers
            if answers.get(rank, str(where)) != str(where)
        ]
        facts = [f"no sign of {self._last_seen(silent, behind)}"] if silent else []
        facts += [f"{self._name([rank])} is waiting in {answers[rank]}" for rank in elsewhere]
        found = "; ".join(facts) or "no rank is missing, yet nothing arrives"
        text = f"timed out after {waited_s:.1f} s in {where}: {found}"
        return Failure([*silent, *elsewhere], f"{text}. {_IF_SLOW}")

    def _silent(self, behind: Mapping[int, int], awaited: Sequence[int]) -> list[int]:
        """Return all ranks but those of this node that have come, and those that have answered."""
        have_come = set(self._topology.node_ranks) - set(behind) - set(awaited)
        present = {self._topology.rank, *self._probe.answers, *have_come}
        return [rank for rank in range(self._topology.world_size) if rank not in present]

    def _failed_ranks(self) -> list[int]:
        """Return the ranks that MPI knows to have failed: none if it does not keep track."""
        comm = self._topology.comm
        try:
            failed = comm.Get_failed()
            return sorted(failed.Translate_ranks(None, comm.group)) if failed.size else []
        except (MPI.Exception, NotImplementedError):  # it must not hide the error at hand
            return []

    def _last_seen(self, ranks: Sequence[int], behind: Mapping[int, int]) -> str:
        """Name the ranks with the last steps in which they are known to have been."""
        # Ranks of other nodes have entered at least the last collective that has completed.
        steps = {rank: behind.get(rank, self._met_in_step) for rank in ranks}
        return ", ".join(f"{self._name([r])} (last seen in step {steps[r]})" for r in ranks)

    def _name(self, ranks: Sequence[int]) -> str:
        """Return the ranks as text, with their hosts if there are several."""
        hosts = self._topology.hosts
        several = len(set(hosts)) > 1
        return ", ".join(f"rank {r} on {hosts[r]}" if several else f"rank {r}" for r in ranks)
