"""NAdam for JAX: ``from shardopt.jax import NAdam, nadam``."""

from shardopt.jax.optimizer import NAdam
from shardopt.jax.state import NAdamState
from shardopt.jax.transformation import nadam

__all__ = ["NAdam", "NAdamState", "nadam"]
