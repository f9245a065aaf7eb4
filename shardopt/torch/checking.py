"""Tensors that the core can use, and errors for those that it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardopt.errors import PartitionError
from shardopt.params.adapter import array_error
from shardopt.torch.tensors import as_array

if TYPE_CHECKING:
    from shardopt._typing import FloatArray

_DTYPES = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}


def require_ordinary(param: Tensor, name: str) -> None:
    """Refuse a tensor that no optimizer could train in place.

    Raises:
        PartitionError: See above.
    """
    problem = None
    if torch.nn.parameter.is_lazy(param):
        problem = "initialised; got a lazy one. Run the model once first"
    elif not param.is_leaf:
        problem = f"a leaf; got a result of {param.grad_fn}. Pass the tensor it was computed from"
    elif param.is_inference():
        problem = "no inference tensor; got one. Make it outside torch.inference_mode()"
    elif getattr(param, "grad_dtype", None) not in (None, param.dtype):  # newer than torch 2.6
        problem = f"without a grad_dtype of its own; got {param.grad_dtype}. Leave it alone: "
        problem += "gradients of 16 bits are summed in float32"
    if problem is not None:
        raise PartitionError(f"parameter {name!r} must be {problem}.")


def require_whole(param: Tensor, name: str, comm_size: int) -> None:
    """Refuse the shards of other libraries.

    FSDP keeps a shard of its own on every rank, and averages gradients itself. Averaged once more,
    the shards would overwrite each other; an optimizer of each rank's own updates them as they are.

    Raises:
        PartitionError: It is such a shard.
    """
    if hasattr(param, "device_mesh"):
        raise PartitionError(
            f"parameter {name!r} must be a whole tensor; got a DTensor, as fully_shard() and "
            "tensor parallelism make them. Pass the parameters of the plain model: shardopt shards "
            "moments and updates itself."
        )
    if comm_size > 1 and hasattr(param, "_fsdp_flattened"):
        raise PartitionError(
            f"parameter {name!r} must be a whole tensor; got a shard of "
            "FullyShardedDataParallel. Pass comm=MPI.COMM_SELF, so that each rank updates its own "
            "shard with the gradients that FSDP has averaged, or do not wrap the model: shardopt "
            "shards moments and updates itself."
        )


def dense_array(role: str, name: str, tensor: Tensor) -> FloatArray:
    """Return a tensor's memory as an array, where it is; ``role`` and ``name`` are for messages.

    Raises:
        PartitionError: It is not a plain tensor of dense numbers.
    """
    require_dense(role, name, tensor)
    try:
        return as_array(tensor)
    except (RuntimeError, TypeError) as error:
        got = f"{type(tensor).__name__} ({error})"
        raise array_error(
            role, name, rule="a plain tensor", got=got, remedy="Make it local"
        ) from error


def require_dense(role: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor without dense numbers in memory that the core addresses.

    Raises:
        PartitionError: See above.
    """
    if tensor.layout is not torch.strided:
        remedy = "Call .to_dense() on it, or construct its layer with sparse=False"
        raise array_error(role, name, rule="dense", got=f"layout {tensor.layout}", remedy=remedy)
    if tensor.device.type not in ("cpu", "cuda"):
        rule, got = "on the CPU or a CUDA GPU", f"device {tensor.device}"
        remedy = "Materialize it with .to_empty() first" if tensor.is_meta else "Move it there"
        raise array_error(role, name, rule=rule, got=got, remedy=remedy)
    if tensor.dtype not in _DTYPES:
        rule, got = "floating point or complex, 16 to 128 bits", f"dtype {tensor.dtype}"
        raise array_error(role, name, rule=rule, got=got, remedy="Convert it")
