"""The report of a step: norm, clipping, times, bytes, and warnings about what went wrong."""

import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardopt.errors import (
    DivergedWarning,
    EditedGradientsWarning,
    LostStateWarning,
    NoGradientWarning,
    NonFiniteWarning,
)
from shardopt.trace import OFF, Trace

_INSIDE = ("shardopt.", "torch.")  # torch wraps step()


@dataclass(frozen=True, slots=True)
class StepReport:
    """The last ``step()`` in figures; the same on every rank except for seconds and bytes.

    Attributes:
        step: The number of calls of ``step()`` so far, including skipped ones.
        grad_norm: Global L2 norm of the averaged gradient before clipping, or None if it was not
            measured (``max_grad_norm`` and ``check_finite`` both off).
        clip_factor: The factor that clipping applied to the gradient; 1.0 if none was needed.
        skipped: Whether no rank updated anything, because a gradient was inf or NaN.
        loss_scale: The factor on the loss, by which the step divided the gradients.
        num_updated: The number of parameters that had a gradient on some rank; None if the step
            was skipped or there are no parameters.
        seconds: This rank's time by phase: ``agree`` (including the wait for other ranks),
            ``reduce``, ``update``, ``finish``.
        waited_s: Seconds of ``reduce`` and ``update`` in which this rank waited for other nodes; in
            stage 2 also those of backward in which it waited for other ranks.
        copied_nbytes: Bytes copied in because a gradient or parameter had been replaced. Those that
            torch's backward copies after ``model.zero_grad()``, instead of adding to zeros, count.
        sent_nbytes: Bytes of gradients and parameters that this rank sent to other nodes. They are
            as ``plan_traffic`` predicts, unless gradients changed after they were sent or nothing
            was updated.
        sent_messages: The number of messages in which they were sent.
        late_nbytes: Bytes of gradients that this rank has kept to itself in stage 2, as others had
            not made room for them in time: see [Note: gradients averaged in backward].
        poisoned_param: The first parameter found with inf or NaN after an update, or None. It is
            kept until parameters are replaced or a state is loaded.
        poisoned_since: The step that left it so, or None; on a device it may be the step after, as
            nobody waits for what a step finds there.
        edited_grads: Whether gradients were changed between backward and the step although they had
            not been averaged yet, as far as the framework sees.
        diverged: What ranks had written different values to before the step; each part of it has
            the value of the rank that owns it.
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
    late_nbytes: int = 0
    poisoned_param: str | None = None
    poisoned_since: int | None = None
    edited_grads: bool = False
    diverged: Sequence[str] = ()

    def with_poison(self, poisoned_param: str | None, before: "StepReport") -> "StepReport":
        """Return the report with the poisoned parameter, if there is one.

        Args:
            poisoned_param: The first parameter that this step left with inf or NaN, or None.
            before: The report of the previous step, whose poisoned parameter is kept.
        """
        if before.poisoned_param is not None:
            poisoned_param = before.poisoned_param
        if poisoned_param is None:
            return self
        since = before.poisoned_since or self.step
        return replace(self, poisoned_param=poisoned_param, poisoned_since=since)

    def warnings(self, before: "StepReport") -> Iterator[Warning]:
        """Yield a warning for each problem that the previous step did not have."""
        found = self.grad_norm is not None  # else the caller, or GradScaler, reported it
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
        if self.diverged:
            yield diverged_warning(self.diverged)
        if self.num_updated == 0 and before.num_updated != 0:
            yield NoGradientWarning(
                f"step {self.step} updated nothing: some parameter must have a gradient on some "
                "rank; got none. Call backward before step, and build the optimizer after anything "
                "that makes new parameters, such as load_state_dict(assign=True)."
            )

    def without_poison(self) -> "StepReport":
        """Return the report without its poisoned parameter, as its values have been replaced."""
        return replace(self, poisoned_param=None, poisoned_since=None)


def diverged_warning(diverged: Sequence[str]) -> DivergedWarning:
    """Return the warning that ranks have written different values.

    Args:
        diverged: What they have written to, as text.
    """
    more = f" and {len(diverged) - 3} more" if len(diverged) > 3 else ""
    return DivergedWarning(
        f"ranks have written different values to {', '.join(diverged[:3])}{more}: each part now "
        "has the value of the rank that owns it. Write the same on all ranks (seed them alike), or "
        "call opt.adopt(rank=0)."
    )


def edited_warning(step: int) -> EditedGradientsWarning:
    """Return the warning that gradients were changed before they are averaged.

    Before a step averages them, a rank's gradients are those of its own batch. To clip them, to
    add noise or to take a norm then is not what the same code does in one process or under DDP.

    Args:
        step: The step.
    """
    return EditedGradientsWarning(
        f"gradients were changed between backward and step {step}: they are this rank's own until "
        "the step averages them, so that each rank has clipped or changed its own part. Pass "
        "max_grad_norm to clip, or call opt.average_grads() before changing gradients. This is "
        "said once."
    )


def lost_state_warning(names: Sequence[str]) -> LostStateWarning:
    """Return the warning that parameters have come back without their state."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return LostStateWarning(
        f"{', '.join(map(repr, names[:3]))}{more} came back to param_groups and starts anew: the "
        "state of a parameter is let go when it leaves, while torch would keep it in opt.state. "
        "Take it along: entry = copy.deepcopy(opt.state[p]) before, opt.state[p] = entry after."
    )


def tell(warning: Warning, *, aloud: bool) -> None:
    """Issue a warning that points to the line outside this package that made the call.

    Every rank calls it, because all ranks must raise if warnings are errors; but one prints it.

    Args:
        warning: The warning.
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
    """A clock that measures named laps, which a trace shows, too.

    Args:
        trace: Shows them.

    Attributes:
        seconds: The time of each lap so far.
    """

    def __init__(self, trace: Trace = OFF) -> None:
        self.seconds: dict[str, float] = {}
        self._trace = trace
        self._last_ns = time.perf_counter_ns()

    def lap(self, name: str) -> None:
        """End the current lap under the name ``name``, and begin the next."""
        now_ns = time.perf_counter_ns()
        self.seconds[name] = (now_ns - self._last_ns) / 1e9
        self._trace.lap(name, self._last_ns, now_ns)
        self._last_ns = now_ns
