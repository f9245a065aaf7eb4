"""Agreement at both ends of a step. No data is moved here."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from shardopt.comm.consensus import Consensus, Outcome, digest_of
from shardopt.params.inputs import AgreedInputs, LocalInputs
from shardopt.params.registry import describe_hypers

if TYPE_CHECKING:
    from shardopt.core.listeners import BackgroundWork


class StepConsensus:
    """The two meetings of all ranks around a step.

    Args:
        consensus: How ranks agree.

    Attributes:
        background: Work that they poll, the same on every rank, in the same order.
    """

    def __init__(self, consensus: Consensus) -> None:
        self.background: list[BackgroundWork] = []
        self._consensus = consensus

    def enter(self, found: Outcome[LocalInputs], step: int, call: str = "step()") -> AgreedInputs:
        """Agree on the inputs of a step.

        Collective: every rank.

        Args:
            found: This rank's inputs, or the error met in finding them.
            step: Number of the step.
            call: The user's call, for messages.

        Raises:
            Exception: The error of the lowest rank that has one, on every rank.
            RankMismatchError: Ranks have different hyperparameters or make different calls.
        """
        inputs = found.value or LocalInputs()
        shares, consensus = inputs.shares, self._consensus
        values = [hyper.values() for hyper in inputs.hypers]
        digest = digest_of(call, step, values, inputs.same, shares.fingerprint())
        everyone = [shares]
        if not consensus.agree(digest, found.error, step=step, phase="agree"):
            hypers = describe_hypers(inputs.hypers)
            description = {"the call": call, "the step": step, **hypers, **inputs.same}
            consensus.require_same(description, step=step, phase="agree")
            everyone = consensus.collectives.allgather(shares, step, "agree")
        return AgreedInputs.merge(inputs.hypers, everyone)

    def leave(self, poisoned: int, order: int, step: int) -> tuple[int, bool, list[int]]:
        """End a step on all ranks.

        Collective: every rank.

        Args:
            poisoned: Index of a parameter that this rank left with inf or NaN; larger than all
                indices if there is none.
            order: A number that may be the same on all ranks.
            step: Number of the step.

        Returns:
            The lowest index of all ranks, whether ``order`` was the same, and for each background
            work the lowest vote.
        """
        mine = np.array([poisoned, order, -order, *(work.vote() for work in self.background)])
        collectives = self._consensus.collectives
        first, least, greatest, *votes = map(
            int, collectives.allreduce(mine, MPI.MIN, step, "finish")
        )
        return first, least == -greatest, votes

    def notify(self, votes: Sequence[int]) -> None:
        """Pass the lowest votes on to the work, once the step is over: it may raise."""
        for work, vote in zip(list(self.background), votes, strict=True):
            work.after_step(vote)
