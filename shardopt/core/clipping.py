"""Clipping by the global norm, and which steps are skipped."""

import math
from dataclasses import dataclass

from shardopt.combinations import checks_finite, why_not_clip
from shardopt.errors import HyperparamsError
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
        num_nodes: Nodes; what is sent between them in float16 overflows as easily.
    """

    max_grad_norm: float | None
    policy: ShardPolicy
    memory: Memory
    num_nodes: int

    @property
    def needs_norm(self) -> bool:
        """Whether the norm must be known before the update, which takes a pass over gradients."""
        if self.max_grad_norm is not None:
            return True
        has_float16 = self.memory.overflows_easily
        return checks_finite(self.policy, self.num_nodes, has_float16=has_float16)

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
    if (refused := why_not_clip(policy, norm)) is not None:
        raise refused
    return norm
