"""Sharded Adam, AdamW, NAdam and RAdam for models that train under mpirun."""

from typing import TYPE_CHECKING, Any

from shardopt import errors
from shardopt._version import __version__
from shardopt.policy import ShardPolicy
from shardopt.report import StepReport

if TYPE_CHECKING:
    from shardopt.numpy import Adam, AdamW, NAdam, Parameter, RAdam

__all__ = [
    "Adam",
    "AdamW",
    "NAdam",
    "Parameter",
    "RAdam",
    "ShardPolicy",
    "StepReport",
    "__version__",
    "errors",
]


def __getattr__(name: str) -> Any:
    """Load the optimizer, and with it MPI and Numba, on first use."""
    if name in ("Adam", "AdamW", "NAdam", "Parameter", "RAdam"):
        from shardopt import numpy  # here, so that importing shardopt stays light

        return getattr(numpy, name)
    raise AttributeError(f"module 'shardopt' has no attribute {name!r}")
