"""Checkpoints: sharded over files, loadable on any number of ranks, safe at any instant."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardopt.checkpoint.checkpointer import Checkpointer
    from shardopt.checkpoint.loading import load
    from shardopt.checkpoint.report import LoadReport, Restored
    from shardopt.checkpoint.rng.streams import capture_rng, restore_rng
    from shardopt.checkpoint.saving import save

_HOMES = {
    "Checkpointer": "checkpointer",
    "LoadReport": "report",
    "Restored": "report",
    "capture_rng": "rng",
    "load": "loading",
    "restore_rng": "rng",
    "save": "saving",
}

__all__ = [
    "Checkpointer",
    "LoadReport",
    "Restored",
    "capture_rng",
    "load",
    "restore_rng",
    "save",
]


def __getattr__(name: str) -> Any:
    """Load MPI and the optimizer when they are asked for: to look into files needs neither."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
