"""Tensors on GPUs, as the core's arrays see them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt.backends.devices import HOST


def place_of(tensor: Tensor) -> str:
    """Return where a tensor is: ``cpu``, or a device such as ``cuda:0``."""
    return f"cuda:{tensor.device.index}" if tensor.is_cuda else HOST


def current_queue(place: str) -> int:
    """Return the stream that work on a device goes to now; 0 on the host."""
    return 0 if place == HOST else int(torch.cuda.current_stream(place).cuda_stream)


class TensorArray:
    """The memory of a tensor on a device, in the form of an array of it; no elements.

    Args:
        tensor: Of real numbers, [any shape].

    Attributes:
        dtype: NumPy's.
        shape: The tensor's.
        strides: In bytes.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.dtype: np.dtype[Any] = np.dtype(str(tensor.dtype).removeprefix("torch."))
        self.shape = tuple(tensor.shape)
        self.strides = tuple(step * self.itemsize for step in tensor.stride())
        if tensor.is_cuda:  # else torch might hand it on while the core still copies it
            tensor.record_stream(torch.cuda.current_stream(tensor.device))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "data": (self._tensor.data_ptr(), False),
            "shape": self.shape,
            "strides": None if self._tensor.is_contiguous() else self.strides,
            "typestr": f"<u{self.itemsize}",  # bits, as not every dtype has a name there
            "version": 3,
        }

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self._tensor.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.itemsize

    def copy(self) -> TensorArray:
        """Return a copy in memory of its own."""
        return TensorArray(self._tensor.clone())
