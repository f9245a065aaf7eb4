"""Tensors and arrays that share memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from shardopt.backends.base import is_on_device
from shardopt.backends.devices import HOST
from shardopt.torch import devices

if TYPE_CHECKING:
    from shardopt._typing import FloatArray


def as_array(tensor: Tensor) -> FloatArray:
    """Return a tensor's memory as an array of reals: complex [...] becomes [..., 2].

    That of one on a device is an array of the device.
    """
    tensor = _as_reals(tensor)
    if devices.place_of(tensor) == HOST:
        return _host_array(tensor)
    array: Any = devices.TensorArray(tensor)
    return cast("FloatArray", array)


def as_host_array(tensor: Tensor) -> FloatArray:
    """Return the same for a tensor in the CPU's memory."""
    return _host_array(_as_reals(tensor))


def _host_array(tensor: Tensor) -> FloatArray:
    if tensor.dtype is torch.bfloat16:
        array: FloatArray = tensor.view(torch.int16).numpy().view("bfloat16")
    else:
        array = tensor.numpy()
    return array


def _as_reals(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def as_tensor(array: FloatArray) -> Tensor:
    """Return a tensor over an array's memory, on the host or a device."""
    if array.dtype.kind == "V":  # bfloat16; to look its name up is slow
        return _share(array.view(np.int16)).view(torch.bfloat16)
    return _share(array)


def _share(array: Any) -> Tensor:
    return from_dlpack(array) if is_on_device(array) else torch.from_numpy(array)


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


def to_stored(tensor: Tensor) -> tuple[Any, str]:
    """Return an array over a tensor's memory, or a copy of one on a device, and its form.

    Raises:
        TypeError: The tensor is sparse, quantized or without memory, or NumPy lacks its dtype.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"{tensor.layout}, quantized or meta")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    form = str(tensor.dtype)
    if tensor.dtype is torch.bfloat16:
        return as_host_array(tensor), form
    if form.startswith("torch.float8"):
        tensor = tensor.view(torch.uint8)
    return tensor.numpy(), form


def from_stored(array: FloatArray, form: str) -> Tensor:
    """Return a tensor over an array's memory.

    Raises:
        TypeError: There is no such form.
        ValueError: The array is not of that form.
    """
    tensor, dtype = as_tensor(array), getattr(torch, form.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"the form {form!r}")
    if tensor.dtype is torch.uint8 and form.startswith("torch.float8"):
        tensor = tensor.view(dtype)
    if tensor.dtype is not dtype:
        raise ValueError(f"{tensor.dtype} in the form {form!r}")
    return tensor
