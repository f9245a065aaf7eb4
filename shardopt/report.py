"""What one step did, for those who watch a training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class StepReport:
    """The last ``step()`` in figures; the same on every rank but for seconds and bytes.

    Attributes:
        step: Calls of ``step()`` so far, skipped ones included.
        grad_norm: Global L2 norm of the averaged gradient before clipping, or None where no pass
            measured it (``max_grad_norm`` and ``check_finite`` both off).
        clip_factor: What the gradient was multiplied by; 1.0 where it was short enough.
        skipped: Whether a gradient was inf or NaN and therefore nothing was updated on any rank.
        seconds: This rank's time by phase: ``agree`` (waiting for the others included), ``reduce``,
            ``update``, ``finish``.
        copied_nbytes: Gradients and parameters that had been replaced and were copied in.
        sent_nbytes: Bytes this rank sent to other nodes.
        poisoned_param: The first parameter that holds inf or NaN, or None.
        poisoned_since: The step in which that was first seen, or None.
    """

    step: int = 0
    grad_norm: float | None = None
    clip_factor: float = 1.0
    skipped: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    copied_nbytes: int = 0
    sent_nbytes: int = 0
    poisoned_param: str | None = None
    poisoned_since: int | None = None

    def diagnosed(self, poisoned_param: str | None, before: "StepReport") -> "StepReport":
        """Add what is known of poisoned parameters.

        Args:
            poisoned_param: The first that this step left with inf or NaN, or None.
            before: The report of the step before.
        """
        if self.skipped:
            poisoned_param = before.poisoned_param
        if poisoned_param is None:
            return self
        since = before.poisoned_since or self.step
        return replace(self, poisoned_param=poisoned_param, poisoned_since=since)
