"""Spans that torch's profiler shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def annotate(name: str) -> AbstractContextManager[object] | None:
    """Return a span for the profiler that runs in this thread, or None if none does."""
    if not torch.autograd.profiler._is_profiler_enabled:
        return None
    return torch.profiler.record_function(f"shardopt: {name}")
