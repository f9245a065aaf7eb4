"""NAdam for PyTorch: ``from shardopt.torch import NAdam``."""

from shardopt.torch.optimizer import NAdam

__all__ = ["NAdam"]
