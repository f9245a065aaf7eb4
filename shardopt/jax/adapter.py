"""The adapter of JAX: pytrees as lists of leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import numpy as jnp

from shardopt.errors import PartitionError
from shardopt.jax.arrays import name_of
from shardopt.jax.model import load_tree, read_tree
from shardopt.layout.dtypes import DTYPES
from shardopt.params.adapter import array_error
from shardopt.params.array_adapter import ArrayAdapter
from shardopt.params.averaged_arrays import AveragedArrays
from shardopt.params.binding import require_like

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from shardopt._typing import FloatArray
    from shardopt.params.model import ModelContent
    from shardopt.policy import ShardPolicy

_ARGUMENTS = {"data": "params", "grad": "grads"}
_REMEDIES = {
    "c": "Make its real and imaginary parts two leaves, as optax.contrib.split_real_and_imaginary "
    "does around shardopt.jax.nadam",
    **dict.fromkeys("iub", "Leave it out, for example by optax.masked or equinox.partition"),
}


class Leaf:
    """One leaf of the parameters, as ``param_groups`` lists it.

    Attributes:
        name: Its path in the tree, for messages.
        data: Its value, in shared memory.
        grad: Its gradient, [same shape and dtype], or None.
        placement: The sharding that the user chose for it, or None to leave the choice to JAX.
    """

    __slots__ = ("__weakref__", "data", "grad", "name", "placement")

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

    def read_model(
        self, model: Any, params: Sequence[Leaf], saved: Collection[str] | None
    ) -> ModelContent:
        """See ``Adapter.read_model``: any pytree is a model."""
        return read_tree(model, params, saved)

    def load_model(
        self, model: Any, params: Sequence[Leaf], content: ModelContent, values: Mapping[str, Any]
    ) -> tuple[Any, Sequence[str]]:
        """See ``Adapter.load_model``."""
        return load_tree(model, params, content, values), []


class _AveragingAdapter(AveragedArrays[Leaf], JaxAdapter):
    """The same in stage 2; see ``AveragedArrays``."""


def make_adapter(policy: ShardPolicy | None) -> JaxAdapter:
    """Return a new adapter for a policy; each optimizer needs its own."""
    return _AveragingAdapter() if getattr(policy, "stage", 1) == 2 else JaxAdapter()


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
        name = name_of(path)
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
        PartitionError: The tree has another structure, or a leaf is no array of the parameter's
            shape and dtype.
    """
    try:
        values = structure.flatten_up_to(tree)
    except ValueError as error:
        difference = _describe_difference(tree, leaves) or str(error).partition(".")[0]
        raise PartitionError(
            f"{_ARGUMENTS[role]} must be a tree like the optimizer's params; got {difference}. "
            "Pass what jax.grad returns for these params, or the params themselves."
        ) from error
    arrays = [
        None if value is None else _dense_array(role, leaf.name, value)
        for value, leaf in zip(values, leaves, strict=True)
    ]
    for leaf, array in zip(leaves, arrays, strict=True):
        if array is not None:
            require_like(role, leaf.name, array, leaf.data)
    return arrays


def require_untraced() -> None:
    """Refuse to run where JAX traces, even if all arguments are known: it would run just once.

    Raises:
        PartitionError: JAX is tracing.
    """
    if isinstance(jnp.add(0, 0), jax.core.Tracer):
        raise PartitionError(
            "the optimizer must be called outside of jax.jit, jax.lax.cond and the like; got a "
            "call that is traced. Compile what computes the gradients instead; see "
            "docs/frameworks.md for the wrappers of optax that trace."
        )


def _describe_difference(tree: Any, leaves: Sequence[Leaf]) -> str | None:
    """Name the first leaf that only one of the two trees has, or return None."""
    try:
        paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is None)
    except ValueError:  # a dict whose keys cannot be sorted
        return None
    given = {name_of(path): value for path, value in paths}
    wanted = [leaf.name for leaf in leaves]
    for name in wanted:
        if name not in given:
            return f"nothing for {name!r}"
    others = (name for name, value in given.items() if name not in wanted and value is not None)
    return next((f"something for {name!r}" for name in others), None)


def _dense_array(role: str, name: str, value: Any) -> FloatArray:
    """Return a leaf as a NumPy array, without a copy if it is in the CPU's memory."""
    if isinstance(value, jax.core.Tracer):
        raise array_error(
            role,
            name,
            rule="known when the optimizer is called",
            got="a tracer",
            remedy="Call it outside of jax.jit, and compile what computes the gradients",
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
            remedy=_REMEDIES.get(array.dtype.kind, "Convert it, or keep it elsewhere"),
        )
    return array
