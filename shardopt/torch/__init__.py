"""The optimizers for PyTorch: ``from shardopt.torch import AdamW``."""

from shardopt.torch.optimizers import Adam, AdamW, NAdam, RAdam

__all__ = ["Adam", "AdamW", "NAdam", "RAdam"]
