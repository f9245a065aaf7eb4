"""Random streams in checkpoints."""

from shardopt.checkpoint.rng.streams import capture_rng, restore_rng

__all__ = ["capture_rng", "restore_rng"]
