"""The adapter of JAX: pytrees as lists of leaves, and jax arrays as NumPy arrays and back.

[Note: arrays that never change]
``jax.device_put`` and DLPack make a jax array share the memory of a NumPy buffer that starts on a
multiple of 64 bytes, even with ``may_alias=False``, and parameters in shared memory start on such
multiples. Arrays handed out are therefore made from copies that nobody else holds. These copies
start on such a multiple, too, so that JAX adopts them without copying again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import numpy as jnp

from shardopt.errors import PartitionError
from shardopt.layout.dtypes import DTYPES
from shardopt.params.adapter import ArrayAdapter, array_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardopt._typing import FloatArray

_ARGUMENTS = {"data": "params", "grad": "grads"}
_ALIGNMENT_NBYTES = 64  # XLA's; see [Note: arrays that never change]


class Leaf:
    """One leaf of the parameters, as ``param_groups`` lists it.

    Attributes:
        name: Its path in the tree, for messages.
        data: Its value, in shared memory.
        grad: Its gradient, [same shape and dtype], or None.
        placement: The sharding that the user chose for it, or None to leave the choice to JAX.
    """

    __slots__ = ("data", "grad", "name", "placement")

    def __init__(self, name: str, data: FloatArray, placement: Any) -> None:
        self.name = name
        self.data = data
        self.grad: FloatArray | None = None
        self.placement = placement

    def __repr__(self) -> str:
        return f"<{self.name}, shape={self.data.shape}>"


class JaxAdapter(ArrayAdapter[Leaf]):
    """See ``Adapter``."""

    def name(self, param: Leaf) -> str | None:
        """Return the leaf's path in the tree."""
        if not isinstance(param, Leaf):
            raise PartitionError(
                f"params must be one pytree, given at once; got a {type(param).__name__} later. "
                "Build a new optimizer for the larger tree."
            )
        return param.name

    def data(self, param: Leaf, name: str) -> FloatArray:
        """See ``Adapter.data``; ``make_leaves`` and ``flatten_like`` have checked the array."""
        return param.data

    def value(self, value: Any, name: str) -> FloatArray:
        """See ``Adapter.value``."""
        return _dense_array("data", name, value)

    def grad(self, param: Leaf, name: str) -> FloatArray | None:
        """See ``Adapter.grad``; ``flatten_like`` has checked the array."""
        return param.grad


def make_leaves(params: Any) -> tuple[list[Leaf], Any]:
    """Flatten the parameters.

    Returns:
        The leaves, and the structure of the tree.

    Raises:
        PartitionError: A leaf is not an array that can be trained.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves: list[Leaf] = []
    starts: set[int] = set()
    for path, value in paths:
        name = _name_of(path)
        array = _dense_array("data", name, value)
        if array.dtype != jax.dtypes.canonicalize_dtype(array.dtype):
            raise array_error(
                "data",
                name,
                rule="of a dtype that JAX keeps",
                got=array.dtype,
                remedy="Set jax_enable_x64, or convert it with .astype(np.float32)",
            )
        if array.ctypes.data in starts:  # leaves of equal value may share an array without a tie
            array = array.copy()
        starts.add(array.ctypes.data)
        chosen = isinstance(value, jax.Array) and value.committed
        leaves.append(Leaf(name, array, value.sharding if chosen else None))
    return leaves, structure


def flatten_like(
    structure: Any, leaves: Sequence[Leaf], role: str, tree: Any
) -> list[FloatArray | None]:
    """Flatten a tree that must have the parameters' structure, with None allowed for any leaf.

    Args:
        structure: The structure of the parameters.
        leaves: The parameters.
        role: ``data`` or ``grad``, for messages.
        tree: The tree.

    Raises:
        PartitionError: The tree has another structure, or a leaf is not an array.
    """
    try:
        values = structure.flatten_up_to(tree)
    except ValueError as error:
        difference = _describe_difference(tree, leaves) or str(error).partition(".")[0]
        raise PartitionError(
            f"{_ARGUMENTS[role]} must be a tree like the optimizer's params; got {difference}. "
            "Pass what jax.grad returns for these params, or the params themselves."
        ) from error
    return [
        None if value is None else _dense_array(role, leaf.name, value)
        for value, leaf in zip(values, leaves, strict=True)
    ]


def aligned_copy(array: FloatArray) -> FloatArray:
    """Return a copy in memory of its own; see [Note: arrays that never change]."""
    raw = np.empty(array.nbytes + _ALIGNMENT_NBYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT_NBYTES
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _describe_difference(tree: Any, leaves: Sequence[Leaf]) -> str | None:
    """Name the first leaf that only one of the two trees has, or return None."""
    try:
        paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is None)
    except ValueError:  # a dict whose keys cannot be sorted
        return None
    given = {_name_of(path): value for path, value in paths}
    wanted = [leaf.name for leaf in leaves]
    for name in wanted:
        if name not in given:
            return f"nothing for {name!r}"
    others = (name for name, value in given.items() if name not in wanted and value is not None)
    return next((f"something for {name!r}" for name in others), None)


def _name_of(path: Any) -> str:
    return jax.tree_util.keystr(path) or "params"  # a single array is a tree, too


def _dense_array(role: str, name: str, value: Any) -> FloatArray:
    """Return a leaf as a NumPy array, without a copy if it is in the CPU's memory."""
    if isinstance(value, jax.core.Tracer):
        raise array_error(
            role,
            name,
            rule="known when the optimizer is called",
            got="a tracer",
            remedy="Call it outside of jax.jit",
        )
    if type(value) is float:
        return np.asarray(value, jnp.result_type(float))
    try:
        array = np.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:  # deleted, on other hosts, or a key
        raise array_error(
            role,
            name,
            rule="readable as a NumPy array",
            got=str(error).partition("\n")[0].rstrip("."),
            remedy="Pass arrays that this process holds",
        ) from error
    if array.dtype.name not in DTYPES:
        raise array_error(
            role,
            name,
            rule=f"of dtype {', '.join(DTYPES)}",
            got=array.dtype if hasattr(value, "dtype") else type(value).__name__,
            remedy="Convert it, or keep it elsewhere",
        )
    return array
