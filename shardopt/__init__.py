"""Sharded NAdam for models that train under mpirun."""

from typing import TYPE_CHECKING, Any

from shardopt import errors
from shardopt._version import __version__
from shardopt.policy import ShardPolicy
from shardopt.report import StepReport

if TYPE_CHECKING:
    from shardopt.numpy import NAdam, Parameter

__all__ = ["NAdam", "Parameter", "ShardPolicy", "StepReport", "__version__", "errors"]


def __getattr__(name: str) -> Any:
    """Load the optimizer, and with it MPI and Numba, on first use."""
    if name in ("NAdam", "Parameter"):
        from shardopt import numpy  # here, so that importing shardopt stays light

        return getattr(numpy, name)
    raise AttributeError(f"module 'shardopt' has no attribute {name!r}")
