"""Spans that NVIDIA's profilers show, on a row of their own beside the kernels."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardopt.trace import Annotate


def make_annotate() -> Annotate | None:
    """Return what marks spans with NVTX; None where CuPy has none."""
    try:
        from cupy.cuda import nvtx
    except ImportError:
        return None

    @contextmanager
    def annotate(name: str) -> Iterator[None]:
        nvtx.RangePush(f"shardopt: {name}")
        try:
            yield
        finally:
            nvtx.RangePop()

    return annotate
