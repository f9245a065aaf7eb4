"""All ranks raise or none does.

[Note: agreement before action]
Whatever may be wrong on one rank only is found before anything that others see is changed, and
brought to ``agree``. There ranks compare one integer, a digest of all that must be equal; only
where digests differ do they tell each other what they have, and raise the same error everywhere.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import xxhash
from mpi4py import MPI

from shardopt.comm.collectives import Collectives
from shardopt.comm.topology import Topology
from shardopt.errors import RankFailureError, RankMismatchError

_T = TypeVar("_T")
_TROUBLE = -1

Description = Mapping[str, object]
"""What a rank has, as ``{name: value}``; names read well in "<name> must be the same"."""


class Consensus:
    """The ranks that train together, and what they must agree on.

    Collective: construction and every method.

    Args:
        topology: The ranks.
        timeout_s: Longest wait for one of them.

    Attributes:
        topology: As given.
        collectives: For allreduces that do not wait for ever.
    """

    def __init__(self, topology: Topology, timeout_s: float) -> None:
        self.topology = topology
        self.collectives = Collectives(topology, timeout_s)

    def all_equal(self, digest: int, step: int, phase: str) -> bool:
        """Say whether all ranks brought one digest; also a barrier.

        Args:
            digest: An integer in [0, 2**62).
            step: For messages.
            phase: For messages.
        """
        lowest_and_highest = self.collectives.allreduce(
            np.array([-digest, digest]), MPI.MAX, step, phase
        )
        return bool(-lowest_and_highest[0] == lowest_and_highest[1] != _TROUBLE)

    def agree(
        self,
        describe: Callable[[], Description],
        error: Exception | None = None,
        *,
        digest: int,
        step: int = 0,
        phase: str,
    ) -> bool:
        """Raise on every rank when one has an error or when ranks describe different things.

        Args:
            describe: Called only where digests differ.
            error: What this rank found wrong, or None.
            digest: Equal digests stand for equal descriptions.
            step: For messages.
            phase: For messages.

        Returns:
            Whether all digests were equal; they may differ in more than is described.

        Raises:
            Exception: The error of the lowest rank that has one, in its own class.
            RankMismatchError: Names the first thing that differs, ranks and values.
        """
        if self.all_equal(_TROUBLE if error is not None else digest, step, phase):
            return True
        raise_first(self.collectives.gather(error, step, phase), error)
        mismatch = first_difference(self.collectives.gather(dict(describe()), step, phase))
        if mismatch is not None:
            raise RankMismatchError(mismatch)
        return False

    def enter_call(
        self, call: str, description: Description, error: Exception | None, *, step: int
    ) -> None:
        """Make sure that all ranks make the same call alike, and that it fails on none of them.

        Args:
            call: Its name, as users know it.
            description: What must be equal; small, as it is hashed at every call.
            error: What this rank found wrong, or None.
            step: For messages.

        Raises:
            Exception: As ``agree`` does.
        """
        self.agree(
            lambda: {"the call": call, **description},
            error,
            digest=digest_of(call, description),
            step=step,
            phase=call,
        )

    def free(self) -> None:
        """Release the communicators and what they share."""
        self.collectives.free()
        self.topology.free()


def attempt(function: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    """Call ``function``; what it raises is handed back, to be agreed upon first.

    Raises:
        RankFailureError: Without agreement, which is beyond ranks that are not all there.
    """
    try:
        return function(), None
    except RankFailureError:
        raise
    except Exception as error:
        return None, _portable(error)


def _portable(error: Exception) -> Exception:
    """The error, or another with its words if other ranks could not read or raise it."""
    try:
        pickle.loads(pickle.dumps(error))
        type(error)(str(error))
    except Exception:
        words = f"{type(error).__name__}: {error}"
        return RuntimeError(words).with_traceback(error.__traceback__)
    return error


def digest_of(*values: object) -> int:
    """Give equal integers in [0, 2**62) for values that print alike."""
    return xxhash.xxh3_64_intdigest(repr(values).encode()) >> 2


def raise_first(errors: Sequence[Exception | None], own: Exception | None) -> None:
    """Raise the error of the lowest rank that has one, naming the ranks unless all have it."""
    failed = [rank for rank, error in enumerate(errors) if error is not None]
    if not failed:
        return
    first = errors[failed[0]]
    assert first is not None
    alike = [rank for rank in failed if str(errors[rank]) == str(first)]
    if len(alike) == len(errors):
        raise type(first)(str(first)) from own
    raise type(first)(f"{_rank_list(alike)}: {first}") from own


def first_difference(descriptions: Sequence[Description]) -> str | None:
    """Say in one sentence what the ranks' descriptions first differ in, or None."""
    for name in dict.fromkeys(name for description in descriptions for name in description):
        ranks_with: dict[str, list[int]] = {}
        for rank, description in enumerate(descriptions):
            value = repr(description[name]) if name in description else "nothing"
            ranks_with.setdefault(value, []).append(rank)
        if len(ranks_with) > 1:
            values = " and ".join(f"{value} on {_rank_list(r)}" for value, r in ranks_with.items())
            return f"{name} must be the same on every rank; got {values}. Give every rank the same."
    return None


def _rank_list(ranks: Sequence[int]) -> str:
    """Write [0, 1, 2, 5] as "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"
