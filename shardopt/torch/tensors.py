"""Tensors and arrays over the same memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardopt._typing import FloatArray


def as_array(tensor: Tensor) -> FloatArray:
    """The tensor's memory, real numbers only: complex [...] becomes [..., 2]."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype is torch.bfloat16:
        array: FloatArray = tensor.view(torch.int16).numpy().view("bfloat16")
    else:
        array = tensor.numpy()
    return array


def as_tensor(array: FloatArray) -> Tensor:
    """A tensor over the array's memory."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_complex(tensor: Tensor) -> Tensor:
    """The same memory, contiguous, as complex numbers: [..., 2] becomes complex [...]."""
    pairs = tensor.view(-1, 2)  # NumPy gives an empty array strides that torch refuses
    return torch.view_as_complex(pairs).view(tensor.shape[:-1])


def look_of(tensor: Tensor) -> tuple[object, ...]:
    """Two tensors that look alike show the same elements in the same order."""
    return (
        tensor.data_ptr(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def state_tensors(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """What torch keeps as tensors in the state of a parameter."""
    tensors = {k: as_tensor(v) for k, v in entry.items() if isinstance(v, np.ndarray)}
    tensors["step"] = torch.tensor(entry["step"], dtype=torch.float32)
    tensors["mu_product"] = torch.tensor(entry["mu_product"], dtype=torch.float64)
    return tensors
