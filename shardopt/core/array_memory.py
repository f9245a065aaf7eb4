"""Which memory arrays have, for those who must not write to what they are about to read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from shardopt._typing import FloatArray


def is_same_memory(left: FloatArray, right: FloatArray) -> bool:
    """Whether two flat arrays are the same memory."""
    address = left.__array_interface__["data"], left.strides, left.shape
    return left.dtype == right.dtype and address == (
        right.__array_interface__["data"],
        right.strides,
        right.shape,
    )


def overlaps_any(array: FloatArray, others: Sequence[Any]) -> bool:
    """Whether an array may share memory with one of several."""
    return any(np.may_share_memory(array, other) for other in others)
