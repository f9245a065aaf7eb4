"""All ranks raise, or none does.

[Note: agreement before action]
Whatever may be wrong on one rank only is found before anything that others see is changed, and
handed to ``Consensus.agree``. There ranks compare one integer, a digest of all that must be equal.
Only if digests differ do they exchange what they have, and raise the same error on every rank.
"""

import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, ParamSpec, TypeVar

import numpy as np
import xxhash
from mpi4py import MPI

from shardopt.comm.collectives import Collectives
from shardopt.comm.failure import FailurePolicy
from shardopt.comm.group import RankGroup, RankGroups, make_group
from shardopt.comm.topology import node_limit
from shardopt.comm.waiting import CONSTRUCTION
from shardopt.errors import RankFailureError, RankMismatchError
from shardopt.policy import ShardPolicy
from shardopt.trace import OFF, Trace

_T = TypeVar("_T")
_P = ParamSpec("_P")
_ERROR = -1  # in the place of a digest
_MASK = (1 << 62) - 1
_SPREAD = 0x9E3779B97F4A7C15  # odd, so that digests of different optimizers differ
_CALL = "the call"
_NO_NUMBER = 0, 0  # in the place of the optimizer's number, which digests contain already

Description = Mapping[str, object]
"""The values of a rank by name; names must read well in "<name> must be the same"."""


class Outcome(NamedTuple, Generic[_T]):
    """The result of a call, or the exception that it raised."""

    value: _T | None
    error: Exception | None


@dataclass(frozen=True)
class RemoteError:
    """An error in a form that every rank can read.

    Attributes:
        error: The error, or a ``RuntimeError`` with its text if other ranks could not read it.
        traceback: Its formatted traceback; empty if it was never raised.
    """

    error: Exception
    traceback: str


class OtherCallError(RankMismatchError):
    """Ranks make different calls, which all of them know and raise."""


class Consensus:
    """Checks that all ranks do the same, and raises on all of them if one cannot.

    Collective: construction and every method.

    Args:
        group: The ranks.
        policy: Has the longest wait for one of them, which may be changed at any time.
        failure: What to do when ranks are missing or lost.
        number: That of the optimizer; see [Note: optimizers share communicators].
        trace: Shows waits.

    Attributes:
        group: As given.
        topology: Likewise, with its communicators.
        collectives: Collectives of these ranks, with the deadline.
    """

    def __init__(
        self,
        group: RankGroup,
        policy: ShardPolicy,
        failure: FailurePolicy,
        number: int,
        trace: Trace = OFF,
    ) -> None:
        self.group = group
        self.topology = group.topology
        self.collectives = Collectives(group, policy, failure, number, trace)
        self._number = number

    def agree(self, digest: int, error: Exception | None = None, *, step: int, phase: str) -> bool:
        """Raise on every rank if one has an error; also a barrier.

        Args:
            digest: An integer in [0, 2**62).
            error: The error of this rank, or None.
            step: Number of the step, for messages.
            phase: What is being done, for messages.

        Returns:
            Whether the digests of all ranks are equal, and of the same optimizer.

        Raises:
            Exception: The error of the lowest rank that has one, in its own class, with the
                traceback of that rank as a note.
        """
        mine = digest + self._number * _SPREAD & _MASK if error is None else _ERROR
        values = np.array([-mine, mine, *_NO_NUMBER])
        extremes = self.collectives.allreduce(values, MPI.MAX, step, phase)
        lowest, highest = -extremes[0], extremes[1]
        if lowest == _ERROR:
            raise_first(self.collectives.allgather(portable(error), step, phase), error)
        return bool(lowest == highest)

    def require_same(self, description: Description, *, step: int, phase: str) -> None:
        """Raise on every rank if the ranks' descriptions differ.

        Args:
            description: What must be equal.
            step: Number of the step, for messages.
            phase: What is being done, for messages.

        Raises:
            RankMismatchError: Names the first thing that differs, with ranks and values.
        """
        mine = self._number, dict(description)
        numbers, descriptions = zip(*self.collectives.allgather(mine, step, phase), strict=True)
        if len(set(numbers)) > 1:
            calls = [each.get(_CALL, phase) for each in descriptions]
            raise RankMismatchError(_describe_optimizers(calls, numbers))
        mismatch = first_difference(descriptions)
        if mismatch is not None:
            raise RankMismatchError(mismatch)

    def enter_call(
        self, call: str, description: Description, error: Exception | None = None, *, step: int
    ) -> None:
        """Make sure that all ranks make the same call with equal arguments, and none has an error.

        Args:
            call: Its name, as users know it.
            description: What must be equal; small, as it is hashed at every call.
            error: The error of this rank, or None.
            step: Number of the step, for messages.

        Raises:
            Exception: As ``agree`` does.
            RankMismatchError: As ``require_same`` does.
        """
        if not self.agree(digest_of(call, description), error, step=step, phase=call):
            self.require_same({_CALL: call, **description}, step=step, phase=call)

    def highest(
        self,
        counts: tuple[int, int],
        call: str,
        *,
        step: int,
        phase: str,
        progress: Callable[[], object] | None = None,
    ) -> tuple[int, int]:
        """Return the highest counts of all ranks; also a barrier.

        Args:
            counts: Two of them, each in [0, 2**60), that need not be equal.
            call: The calls that begin with this, for a message.
            step: Number of the step, for messages.
            phase: What is being done, likewise.
            progress: See ``Collectives.allreduce``.

        Raises:
            OtherCallError: Some ranks make another call.
        """
        # As many numbers as in ``agree``, which other calls begin with. The first makes the ranks
        # in there find that theirs differ; the second is below all that they may have there.
        number = self._number, -self._number
        mine = np.array([counts[0] - 2 * _ERROR, counts[1] - _MASK, *number])
        highest = self.collectives.allreduce(mine, MPI.MAX, step, phase, progress)
        if highest[1] >= _ERROR or (highest[2], highest[3]) != number:
            try:
                self.require_same({_CALL: call}, step=step, phase=phase)
            except RankMismatchError as error:
                raise OtherCallError(str(error)) from None
        return int(highest[0] + 2 * _ERROR), int(highest[1] + _MASK)

    def meet_on_node(
        self,
        test: Callable[[], bool],
        call: str,
        awaited: Callable[[], Sequence[int]],
        *,
        step: int,
        phase: str,
    ) -> None:
        """Wait for something to which all ranks contribute in the same call, on their only node.

        Args:
            test: Whether it is done; makes progress.
            call: As for ``highest``.
            awaited: Returns the ranks that have not contributed.
            step: As for ``highest``.
            phase: Likewise.

        Raises:
            OtherCallError: Some ranks make another call.
        """
        if not self.collectives.meet_on_node(test, step, phase, awaited):
            self.highest((0, 0), call, step=step, phase=phase)

    def barrier(self, step: int, phase: str) -> None:
        """Wait until every rank has come here."""
        self.collectives.allreduce(np.zeros(4, np.int64), MPI.MAX, step, phase)

    def free(self) -> None:
        """Leave the group to the other optimizers on it."""
        self.collectives.free()
        self.group.remove_optimizer()


def make_consensus(
    comm: MPI.Intracomm,
    policy: ShardPolicy,
    failure: FailurePolicy,
    trace: Trace = OFF,
    call: str = CONSTRUCTION,
) -> Consensus:
    """Have the ranks of a new optimizer meet; see [Note: optimizers share communicators].

    The first optimizer on a communicator makes the group, later ones share it.

    Collective: every rank of ``comm``.

    Args:
        comm: The ranks that train together.
        policy: Whether they share a node's memory, and the longest wait for one of them.
        failure: What to do when ranks are missing or lost.
        trace: Shows waits.
        call: The user's call, for messages.

    Raises:
        LauncherError: The ranks were started as several jobs.
        RankFailureError: Not all ranks made this call within ``policy.timeout_s``.
        RankMismatchError: Some ranks make another call on the same communicator.
    """
    groups = RankGroups.of(comm)
    number, first = groups.num_optimizers + 1, groups.first
    group = first or make_group(comm, policy.share_node, policy.timeout_s, failure)
    consensus = Consensus(group, policy, failure, number, trace)
    consensus.enter_call(call, {}, step=0)
    limits = np.array([node_limit(policy.share_node)])
    limit = int(consensus.collectives.allreduce(limits, MPI.MIN, 0, call)[0])
    if first is None:
        groups.by_limit[limit] = group
    elif groups.by_limit.get(limit) is not first:
        if limit not in groups.by_limit:
            group = make_group(comm, policy.share_node, policy.timeout_s, failure)
            groups.by_limit[limit] = group
        consensus = Consensus(groups.by_limit[limit], policy, failure, number, trace)
    groups.num_optimizers = number  # an optimizer that could not be built on all ranks has none
    consensus.group.add_optimizer()
    return consensus


def attempt(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Outcome[_T]:
    """Call ``function`` and return its exception, if it raises one, for ``Consensus.agree``.

    Raises:
        RankFailureError: At once, as ranks that are not all there cannot agree on anything.
        OtherCallError: At once, as all ranks raise it.
    """
    try:
        return Outcome(function(*args, **kwargs), None)
    except (RankFailureError, OtherCallError):
        raise
    except Exception as error:
        return Outcome(None, error)


def portable(error: Exception | None) -> RemoteError | None:
    """Return an error in a form that every rank can read and raise."""
    if error is None:
        return None
    raised = error.__traceback__ is not None
    text = "".join(traceback.format_exception(error)).rstrip("\n") if raised else ""
    try:
        pickle.loads(pickle.dumps(error))
        type(error)(str(error))
    except Exception:
        return RemoteError(RuntimeError(f"{type(error).__name__}: {error}"), text)
    return RemoteError(error, text)


def digest_of(*values: object) -> int:
    """Return an integer in [0, 2**62), equal for values that print alike."""
    return xxhash.xxh3_64_intdigest(repr(values).encode()) >> 2


def raise_first(errors: Sequence[RemoteError | None], own: Exception | None) -> None:
    """Raise the error of the lowest rank that has one, naming the ranks unless all have it.

    The traceback of that rank is added as a note, except where this rank's own error, to which
    the raised one is chained, has the same.

    Args:
        errors: For each rank its error, made ``portable``, or None.
        own: The error of this rank, or None.
    """
    failed = {rank: error for rank, error in enumerate(errors) if error is not None}
    if not failed:
        return
    culprit, first = next(iter(failed.items()))
    text = str(first.error)
    alike = [rank for rank, error in failed.items() if str(error.error) == text]
    prefix = "" if len(alike) == len(errors) else f"{rank_list(alike)}: "
    raised = type(first.error)(prefix + text)
    mine = portable(own)
    if first.traceback and (mine is None or mine.traceback != first.traceback):
        raised.add_note(f"Traceback on rank {culprit}:\n{first.traceback}")
    raise raised from own


def first_difference(descriptions: Sequence[Description]) -> str | None:
    """Return a sentence about the first thing in which the descriptions of ranks differ, or None.

    Args:
        descriptions: Those of all ranks, by rank.
    """
    for name in dict.fromkeys(name for description in descriptions for name in description):
        ranks_with: dict[str, list[int]] = {}
        for rank, description in enumerate(descriptions):
            value = repr(description[name]) if name in description else "nothing"
            ranks_with.setdefault(value, []).append(rank)
        if len(ranks_with) > 1:
            values = " and ".join(f"{value} on {rank_list(r)}" for value, r in ranks_with.items())
            return f"{name} must be the same on every rank; got {values}. Give every rank the same."
    return None


def _describe_optimizers(calls: Sequence[object], numbers: Sequence[int]) -> str:
    """Return a sentence about calls of different optimizers."""
    made = [f"{call} of optimizer {n}" for call, n in zip(calls, numbers, strict=True)]
    difference = first_difference([{_CALL: call} for call in made])
    return f"{difference} Optimizers are numbered in the order in which they were built."


def rank_list(ranks: Sequence[int]) -> str:
    """Write [0, 1, 2, 5] as "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"
