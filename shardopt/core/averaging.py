"""Gradients that are averaged before the step, for users who look at them or change them."""

import math
from typing import Any

from shardopt.comm.consensus import Outcome, attempt
from shardopt.core.consensus import StepConsensus
from shardopt.core.parts import Parts
from shardopt.errors import CallOrderError, HyperparamsError
from shardopt.params.inputs import LocalInputs
from shardopt.rule.hyperparams import as_real

_CALL = "average_grads()"
_STATE = "whether gradients are averaged"


class Averaging:
    """Averages gradients before the step, and knows whether they are averaged.

    After ``average_grads()`` every rank's gradients are the average over all ranks, as after
    DDP's backward, until the next step or ``zero_grad()``. In between ranks may change them, alike;
    the step takes for each shard what its owner has, and averages no more. A backward in between
    would add one rank's gradients to the average of all: the next step, or average, raises. A step
    that raises changes nothing, so gradients stay averaged.

    Args:
        parts: The optimizer's.
        consensus: How ranks agree.

    Attributes:
        changed: Bit mask of the buckets that had to be sent again for the average; see
            [Note: gradients sent during backward].
        copied_nbytes: Bytes that this rank copied for it.
    """

    def __init__(self, parts: Parts, consensus: StepConsensus) -> None:
        self.changed = self.copied_nbytes = 0
        self._parts = parts
        self._consensus = consensus
        self._loss_scale: float | None = None  # None: gradients are not averaged
        self._present = 0
        self._is_mixed = False  # with gradients of a later backward
        self._is_outdated = False  # parameters have come or left since

    @property
    def is_done(self) -> bool:
        """Whether gradients are averaged, and need not be once more."""
        return self._loss_scale is not None and not self._is_outdated

    @property
    def loss_scale(self) -> float:
        """The factor on the loss by which they have been divided already."""
        return 1.0 if self._loss_scale is None else self._loss_scale

    def run(self, loss_scale: Any, step: int, error: Exception | None = None) -> None:
        """Average the gradients of all ranks; do nothing if they are averaged.

        Collective: every rank.

        Args:
            loss_scale: The factor on the loss before backward; the same on every rank.
            step: Number of the next step.
            error: An error of this rank, which all ranks will raise, or None.

        Raises:
            CallOrderError: A backward has come after the last average.
            HyperparamsError: The loss scale is no finite number > 0.
            PartitionError: A gradient was replaced by one that does not fit.
            RankMismatchError: Ranks have different loss scales or make different calls.
        """
        parts = self._parts
        found = attempt(self._inspect, loss_scale, step)  # takes gradients, whatever is wrong
        if error is not None:
            found = Outcome(None, error)
        parts.memory.publish()
        agreed = self._consensus.enter(found, step, _CALL)
        parts.memory.acquire()
        if parts.grads.are_averages:
            parts.grads.adopt_writes(agreed.present)
            parts.meet(step, _CALL)  # owners have written their shards of the row
            parts.grads.show(agreed.present, step)
        if self.is_done or parts.grads.are_averages:
            return
        parts.sync.copies.begin(agreed.present)
        assert found.value is not None
        self.changed, self.copied_nbytes = agreed.changed, found.value.copied_nbytes
        changed = agreed.changed | parts.sync.reduction.activate(agreed.present)
        parts.sync.resend(changed)
        is_scaled = self._is_outdated  # they have been divided by it before
        parts.sync.average(agreed.present, 1.0 if is_scaled else 1.0 / agreed.loss_scale)
        parts.meet(step, _CALL)  # owners have written their shards into the gradients of all
        parts.sync.copies.show_grads(agreed.present)
        parts.registry.bind_present(agreed.present & ~found.value.present)
        self._loss_scale, self._present = agreed.loss_scale, agreed.present
        self._is_outdated = False
        parts.registry.adapter.on_backward(self._on_backward)

    def end(self) -> None:
        """Note that gradients are no longer averaged."""
        if self._loss_scale is not None:
            self._loss_scale, self._is_mixed, self._is_outdated = None, False, False
            self.changed = self.copied_nbytes = 0
            self._parts.registry.adapter.on_backward(None)

    def repeat(self) -> None:
        """Have averaged gradients averaged once more by the step: parameters have come or left.

        Those that stay are the same on all ranks, averaged once more or not; new ones may have
        brought gradients that are not.
        """
        self._is_outdated = self._loss_scale is not None

    def require_unmixed(self) -> None:
        """Refuse averaged gradients to which a backward has added.

        Raises:
            CallOrderError: One has.
        """
        if self._is_mixed:
            raise CallOrderError(
                "average_grads() must come after the last backward of a step; got a backward after "
                "it, which has added to the average. Call zero_grad(), then in this order: "
                "backward, average_grads, unscale_, clip, step."
            )

    def describe(self, loss_scale: float, present: int) -> dict[str, object]:
        """Return what a step demands to be the same on all ranks.

        Args:
            loss_scale: Of the step.
            present: Bit mask of the parameters that have a gradient on this rank.
        """
        described: dict[str, object] = {_STATE: self._loss_scale is not None}
        if self.is_done:
            described["loss_scale"] = loss_scale
            others = self._parts.registry.names_of(present ^ self._present)
            described["the gradients set or removed after average_grads()"] = others
        return described

    def _inspect(self, loss_scale: Any, step: int) -> LocalInputs:
        """Find this rank's inputs of an average.

        Raises:
            Exception: Something is wrong with them.
        """
        parts = self._parts
        if parts.grads.are_updates:
            raise HyperparamsError(
                "policy.update_in_backward must be False for average_grads(); got True. Leave it "
                "out: backward has used the gradients already."
            )
        if parts.grads.are_averages:
            return self._inspect_averages(loss_scale, step)
        self.require_unmixed()
        scale = require_loss_scale(loss_scale)
        if self._loss_scale not in (None, scale):
            raise HyperparamsError(
                f"loss_scale must be that of the first average_grads() of a step; got "
                f"{scale} after {self._loss_scale}. Call it once."
            )
        if self.is_done:
            return LocalInputs(loss_scale=scale, same=self.describe(scale, self._present))
        changed = parts.overlap.hold()  # before other gradients are copied in
        parts.registry.adapter.were_grads_written(0)  # all that comes later holds
        present, copied_nbytes = parts.grads.take(step)
        parts.send_grads(present)
        return LocalInputs(
            present=present,
            loss_scale=scale,
            changed=changed,
            copied_nbytes=copied_nbytes,
            same={**self.describe(scale, present), "loss_scale": scale},
        )

    def _inspect_averages(self, loss_scale: Any, step: int) -> LocalInputs:
        """Find this rank's inputs of an average that backward has computed already.

        Raises:
            Exception: Something is wrong with them.
        """
        present, copied_nbytes = self._parts.grads.take(step)
        if (scale := require_loss_scale(loss_scale)) != 1.0:
            raise HyperparamsError(
                f"loss_scale must be 1 with policy.stage=2; got {scale}. Leave it out, and pass it "
                "to step() or have GradScaler unscale the averages."
            )
        return LocalInputs(
            present=present, copied_nbytes=copied_nbytes, same=self._parts.grads.describe(scale)
        )

    def _on_backward(self) -> None:
        """Note a backward after the average, unless all gradients have been set to None before."""
        if any(binding.holds_grad() for binding in self._parts.registry.bindings):
            self._is_mixed = True
        else:
            self.end()


def require_loss_scale(loss_scale: Any) -> float:
    """Return a loss scale as a float.

    Raises:
        HyperparamsError: It is no finite number > 0.
    """
    scale = as_real("loss_scale", loss_scale)
    if not 0.0 < scale < math.inf:
        raise HyperparamsError(
            f"loss_scale must be a finite number > 0; got {loss_scale}. Leave it out for 1."
        )
    return scale
