"""What ranks agree on around a step, beside the numbers themselves."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from shardopt._typing import FloatArray
from shardopt.comm.consensus import Consensus, Description, attempt, digest_of
from shardopt.core.pipeline import Pipeline
from shardopt.errors import HyperparamsError
from shardopt.params.registry import LocalInputs, Registry, StepInputs, describe_hypers
from shardopt.rule.nadam import as_real

if TYPE_CHECKING:
    from shardopt.core.listeners import StepListener


class StepConsensus:
    """The meetings of all ranks: at the beginning and end of a step, and at other calls.

    Collective: every method.

    Args:
        agreement: The ranks.
        registry: This rank's parameters.
        pipeline: Its memory.

    Attributes:
        listeners: The same on every rank, in the same order.
    """

    def __init__(self, agreement: Consensus, registry: Registry[Any], pipeline: Pipeline) -> None:
        self.listeners: list[StepListener] = []
        self._agreement = agreement
        self._registry = registry
        self._pipeline = pipeline

    def enter_call(
        self, call: str, description: Description, error: Exception | None, *, step: int
    ) -> None:
        """See ``Consensus.enter_call``."""
        self._agreement.enter_call(call, description, error, step=step)

    def meet(self, step: int, phase: str) -> None:
        """Wait for all ranks; what they have written to windows before can be read after."""
        self._pipeline.sync()
        self._agreement.all_equal(0, step, phase)
        self._pipeline.sync()

    def enter_step(
        self, look: Callable[[], LocalInputs], step: int, loss_scale: float, overflowed: bool
    ) -> tuple[LocalInputs, StepInputs]:
        """Agree on a step and make everyone's gradients readable.

        Args:
            look: Surveys this rank's parameters; what it raises is agreed upon.
            step: Number of the step.
            loss_scale: See ``Optimizer.step``.
            overflowed: See ``Optimizer.step``.

        Returns:
            This rank's survey, and what all ranks go by.
        """
        found, error = attempt(lambda: _look(look, loss_scale))
        survey = found or LocalInputs()
        hypers = [hyper.values() for hyper in survey.hypers]
        scale = 1.0 if error is not None else as_real("loss_scale", loss_scale)
        own = StepInputs(
            survey.present, survey.replaced_mask, scale, bool(overflowed), survey.stale
        )
        self._pipeline.sync()
        equal = self._agreement.agree(
            lambda: {"the call": "step()", "the step": step, **describe_hypers(survey.hypers)},
            error,
            digest=digest_of("step()", step, hypers, own.words()),
            step=step,
            phase="agree",
        )
        num_ranks = self._agreement.topology.world_size
        everyone = (
            [own] * num_ranks if equal else self._agreement.collectives.gather(own, step, "agree")
        )
        inputs = StepInputs.merge(everyone)
        copied_nbytes = survey.copied_nbytes
        if inputs.replaced:
            masks = [each.replaced for each in everyone]
            copied_nbytes += self._adopt(survey.replaced, masks, step)
        if own.loss_scale != inputs.loss_scale:
            self._pipeline.scale_grads(inputs.loss_scale / own.loss_scale)
        rescaled = len({each.loss_scale for each in everyone}) > 1
        if inputs.replaced or rescaled:
            self.meet(step, "adopt")
        self._repeat_stale(inputs, step, rescaled=rescaled)
        self._pipeline.sync()
        return replace(survey, copied_nbytes=copied_nbytes), inputs

    def adopt(self, replaced: Mapping[int, FloatArray], step: int) -> bool:
        """Take over parameters that have been replaced on some rank, as a step would.

        Returns:
            Whether there were any.
        """
        mask = sum(1 << index for index in replaced)
        masks = self._agreement.collectives.gather(mask, step, "adopt")
        if not any(masks):
            return False
        self._adopt(replaced, masks, step)
        self.meet(step, "adopt")
        return True

    def finish_step(self, poisoned: int | None, step: int) -> tuple[str | None, list[int]]:
        """Make the updated parameters readable.

        Returns:
            The first parameter that is poisoned on any rank, and for each of the listeners the
            least that they have brought.
        """
        self._pipeline.sync()
        none = len(self._registry.bindings)
        mine = [none if poisoned is None else poisoned, *(f.vote() for f in self.listeners)]
        collectives = self._agreement.collectives
        first, *least = map(int, collectives.allreduce(np.array(mine), MPI.MIN, step, "finish"))
        self._pipeline.sync()
        return None if first == none else self._registry.bindings[first].name, least

    def tell_followers(self, least: Sequence[int]) -> None:
        """Let listeners go on, when the step itself is over: they may raise."""
        for follower, bid in zip(list(self.listeners), least, strict=True):
            follower.after_step(bid)

    def _repeat_stale(self, inputs: StepInputs, step: int, *, rescaled: bool) -> None:
        """See to it that gradients which have left before are exchanged as they are now."""
        if self._pipeline.courier is None:
            return
        exchange, stale = self._pipeline.courier.exchange, inputs.stale
        if rescaled:  # whatever has left had the old scale
            started = np.array([exchange.num_started])
            most = self._agreement.collectives.allreduce(started, MPI.MAX, step, "adopt")
            stale = (1 << int(most[0])) - 1
        exchange.repeat(stale)

    def _adopt(self, replaced: Mapping[int, FloatArray], masks: Sequence[int], step: int) -> int:
        """Of several values of a parameter the lowest rank's wins; gives the bytes copied."""
        topology = self._agreement.topology
        winners: dict[int, int] = {}  # rank by parameter
        for rank, mask in enumerate(masks):
            for index in range(mask.bit_length()):
                if mask >> index & 1:
                    winners.setdefault(index, rank)
        mine = {index for index, rank in winners.items() if rank == topology.rank}
        copied_nbytes = self._registry.adopt(replaced, mine)
        for index, rank in sorted(winners.items()):
            node, lane = topology.places[rank]
            if lane == topology.node_rank:
                self._pipeline.broadcast(self._registry.bindings[index].data, node, step)
        return copied_nbytes


def _look(look: Callable[[], LocalInputs], loss_scale: float) -> LocalInputs:
    if not 0.0 < as_real("loss_scale", loss_scale) < math.inf:
        raise HyperparamsError(
            f"loss_scale must be a finite number > 0; got {loss_scale}. Leave it out for 1."
        )
    return look()
