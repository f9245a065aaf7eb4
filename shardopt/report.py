"""What one step did, for those who watch a training run."""

import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from shardopt.errors import NoGradientWarning, NonFiniteWarning

_INSIDE = ("shardopt.", "torch.")  # torch wraps step()


@dataclass(frozen=True, slots=True)
class StepReport:
    """The last ``step()`` in figures; the same on every rank but for seconds and bytes.

    Attributes:
        step: Calls of ``step()`` so far, skipped ones included.
        grad_norm: Global L2 norm of the averaged gradient before clipping, or None where no pass
            measured it (``max_grad_norm`` and ``check_finite`` both off).
        clip_factor: What the gradient was multiplied by; 1.0 where it was short enough.
        skipped: Whether a gradient was inf or NaN and therefore nothing was updated on any rank.
        loss_scale: What gradients were divided by, as the loss had been multiplied by it.
        num_updated: Parameters that had a gradient on some rank; None where the step was skipped
            and where there are no parameters.
        seconds: This rank's time by phase: ``agree`` (waiting for the others included), ``reduce``,
            ``update``, ``finish``.
        waited_s: Seconds of ``reduce`` and ``update`` in which this rank waited for other nodes.
        copied_nbytes: Gradients and parameters that had been replaced and were copied in.
        sent_nbytes: Gradients and parameters that this rank sent to other nodes: what
            ``plan_traffic`` says, unless gradients changed after they had left or nothing was
            updated.
        sent_messages: In how many messages.
        poisoned_param: A parameter that an update left with inf or NaN, the first seen, or None;
            known until parameters are replaced or a state is loaded.
        poisoned_since: The step in which that was, or None.
    """

    step: int = 0
    grad_norm: float | None = None
    clip_factor: float = 1.0
    skipped: bool = False
    loss_scale: float = 1.0
    num_updated: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    waited_s: float = 0.0
    copied_nbytes: int = 0
    sent_nbytes: int = 0
    sent_messages: int = 0
    poisoned_param: str | None = None
    poisoned_since: int | None = None

    def with_poison(self, poisoned_param: str | None, before: "StepReport") -> "StepReport":
        """Add what is known of poisoned parameters.

        Args:
            poisoned_param: The first that this step left with inf or NaN, or None.
            before: The report of the step before; what it knew of stays known.
        """
        if before.poisoned_param is not None:
            poisoned_param = before.poisoned_param
        if poisoned_param is None:
            return self
        since = before.poisoned_since or self.step
        return replace(self, poisoned_param=poisoned_param, poisoned_since=since)

    def news(self, before: "StepReport") -> Iterator[Warning]:
        """Tell what is wrong now that was not known after the step before."""
        found = self.grad_norm is not None  # else it was the caller, or GradScaler, that knew
        if self.skipped and found and not before.skipped and self.loss_scale == 1.0:
            yield NonFiniteWarning(
                f"step {self.step} was skipped on all ranks: gradients must be finite; got a norm "
                f"of {self.grad_norm}. Lower lr, or look for the step where the loss began to grow."
            )
        if self.poisoned_since == self.step:
            yield NonFiniteWarning(
                f"parameter {self.poisoned_param!r} holds inf or NaN since step {self.step}. Load "
                "an earlier state, and pass ShardPolicy(check_finite=True) to skip such steps."
            )
        if self.num_updated == 0 and before.num_updated != 0:
            yield NoGradientWarning(
                f"step {self.step} updated nothing: some parameter must have a gradient on some "
                "rank; got none. Call backward before step, and build the optimizer after anything "
                "that makes new parameters, such as load_state_dict(assign=True)."
            )

    def without_poison(self) -> "StepReport":
        """Forget poisoned parameters: values have been replaced."""
        return replace(self, poisoned_param=None, poisoned_since=None)


def tell(warning: Warning, *, aloud: bool) -> None:
    """Warn as if from the line outside of this package that made the call; every rank calls it.

    One rank is enough to print it. But where warnings are errors, all ranks must raise.

    Args:
        warning: What to tell.
        aloud: Whether this rank prints it.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    if aloud:
        warnings.warn(warning, stacklevel=level)
        return
    with warnings.catch_warnings():
        warnings.showwarning = lambda *_, **__: None
        warnings.warn(warning, stacklevel=level)


class Stopwatch:
    """Seconds between laps, by name.

    Attributes:
        seconds: The laps so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the lap ``name``; the next begins."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
