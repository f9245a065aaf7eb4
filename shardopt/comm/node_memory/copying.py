"""Copies of many short ranges at once."""

import numpy as np
from numba import types
from numpy.typing import NDArray

from shardopt._typing import IntArray
from shardopt.compiling import compiled


@compiled(
    types.void(
        types.Array(types.uint8, 1, "C"),
        types.Array(types.uint8, 1, "C", readonly=True),
        types.Array(types.int64, 2, "C", readonly=True),
    )
)
def _copy(target: NDArray[np.uint8], source: NDArray[np.uint8], spans: IntArray) -> None:
    for i in range(spans.shape[0]):
        # Slices, since indices that could be negative would keep the loop from being vectorised.
        to, of = target[spans[i, 0] : spans[i, 1]], source[spans[i, 0] : spans[i, 1]]
        for j in range(to.size):
            to[j] = of[j]


def copy_spans(target: NDArray[np.uint8], source: NDArray[np.uint8], spans: IntArray) -> None:
    """Copy some bytes to the same places of another array, of the same length.

    Args:
        target: [n] contiguous.
        source: [n] contiguous; it does not overlap the target.
        spans: [m, 2] contiguous; where each range begins and ends.
    """
    assert target.size == source.size
    assert not spans.size or (spans.min() >= 0 and spans.max() <= target.size)
    _copy(target, source, spans)
