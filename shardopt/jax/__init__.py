"""The optimizers for JAX: ``from shardopt.jax import AdamW, adamw``."""

from shardopt.jax.optimizers import Adam, AdamW, NAdam, RAdam
from shardopt.jax.state import NAdamState
from shardopt.jax.transformations import adam, adamw, nadam, radam

__all__ = ["Adam", "AdamW", "NAdam", "NAdamState", "RAdam", "adam", "adamw", "nadam", "radam"]
