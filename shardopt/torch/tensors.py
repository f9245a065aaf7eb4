"""Tensors and arrays that share memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from shardopt._typing import FloatArray


def as_array(tensor: Tensor) -> FloatArray:
    """Return a tensor's memory as an array of reals: complex [...] becomes [..., 2]."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype is torch.bfloat16:
        array: FloatArray = tensor.view(torch.int16).numpy().view("bfloat16")
    else:
        array = tensor.numpy()
    return array


def as_tensor(array: FloatArray) -> Tensor:
    """Return a tensor over an array's memory."""
    if array.dtype.kind == "V":  # bfloat16; to look its name up is slow
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_complex(tensor: Tensor) -> Tensor:
    """Return contiguous memory as complex numbers: [..., 2] becomes complex [...]."""
    pairs = tensor.view(-1, 2)  # empty NumPy arrays may have strides that torch refuses
    return torch.view_as_complex(pairs).view(tensor.shape[:-1])


def layout_of(tensor: Tensor) -> tuple[object, ...]:
    """Return a key; tensors with equal keys have the same elements in the same order."""
    return (
        tensor.data_ptr(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )
