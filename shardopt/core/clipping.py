"""Clipping by the global norm, and which steps are skipped."""

import math
from dataclasses import dataclass

from shardopt.errors import HyperparamsError
from shardopt.overlap.updated import OPTION
from shardopt.policy import ShardPolicy
from shardopt.rule.hyperparams import as_real
from shardopt.store.memory import Memory

_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_


@dataclass
class Clipping:
    """Decides by the norm of the averaged gradient how a step goes on.

    Attributes:
        max_grad_norm: Clip to this, as ``torch.nn.utils.clip_grad_norm_`` does; None leaves
            gradients alone. May be set between steps, to what ``as_max_grad_norm`` returns.
        policy: Whether to check for inf and NaN.
        memory: Holds the gradients, which overflow easily in float16.
        sends_float16: Whether sums of gradients are sent in float16, and overflow as easily.
    """

    max_grad_norm: float | None
    policy: ShardPolicy
    memory: Memory
    sends_float16: bool

    @property
    def needs_norm(self) -> bool:
        """Whether the norm must be known before the update, which takes a pass over gradients."""
        return self.max_grad_norm is not None or self._checks_finite

    def factor(self, norm: float | None) -> float | None:
        """Return the factor on the gradients, or None if the step must be skipped.

        Args:
            norm: Of the averaged gradient; None if it is not needed.
        """
        if norm is None:
            return 1.0
        if not math.isfinite(norm) and self.policy.check_finite is not False:
            return None
        if self.max_grad_norm is None:
            return 1.0
        factor = self.max_grad_norm / (norm + _CLIP_EPS)
        return 1.0 if factor > 1.0 else factor  # a norm of NaN gives a factor of NaN

    @property
    def _checks_finite(self) -> bool:
        if self.policy.check_finite is None:
            return self.memory.overflows_easily or self.sends_float16
        return self.policy.check_finite


def as_max_grad_norm(value: object, policy: ShardPolicy) -> float | None:
    """Return a norm to clip to as a float, or None.

    Raises:
        HyperparamsError: It is neither a positive number nor None, or cannot be had.
    """
    if value is None:
        return None
    norm = as_real("max_grad_norm", value)
    if not norm > 0:
        raise HyperparamsError(
            f"max_grad_norm must be > 0 or None; got {norm!r}. Leave it out, or set None, not to "
            "clip."
        )
    if policy.update_in_backward:
        raise HyperparamsError(
            f"max_grad_norm must be None with {OPTION}; got {norm}. The norm is known only after "
            "backward, which updates: leave the option out to clip."
        )
    return norm
