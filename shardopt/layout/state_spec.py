"""The arrays that make up a parameter's optimizer state: one table that everything else reads."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shardopt.layout.dtypes import compute_dtype, has_master

PARAM_KEY = "param"
"""The key of a parameter itself, beside those of the arrays of its state."""


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One array of the state of a parameter.

    Attributes:
        key: Its name in state dicts, in checkpoints and for kernels.
        dtype: Of its elements, one for each element of the parameter.
        is_optional: Whether a state dict may lack it: it then starts as zeros.
    """

    key: str
    dtype: str
    is_optional: bool = False

    def nbytes(self, numel: int) -> int:
        """Return the bytes it takes for a parameter, or a shard, of ``numel`` elements."""
        return numel * np.dtype(self.dtype).itemsize


@lru_cache
def state_specs(dtype: str) -> tuple[StateSpec, ...]:
    """Return the state of parameters of ``dtype``.

    A master of zero follows the parameter (see [Note: 16-bit parameters and masters]), so that
    the state dicts of other optimizers, which have none, can be loaded.
    """
    full = compute_dtype(dtype)
    moments = StateSpec("exp_avg", full), StateSpec("exp_avg_sq", full)
    return (*moments, StateSpec("master", full, is_optional=True)) if has_master(dtype) else moments
