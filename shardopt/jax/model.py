"""Pytrees of JAX as models, and JAX's arrays as checkpoints hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import numpy as jnp

from shardopt.jax.arrays import aligned_copy, name_of
from shardopt.params.model import ModelContent

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from shardopt.jax.adapter import Leaf

_VALUES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def read_tree(model: Any, leaves: Sequence[Leaf], saved: Collection[str] | None) -> ModelContent:
    """Return what a checkpoint needs of a pytree; see ``Adapter.read_model``.

    The parameters are a subtree with their paths. As arrays have no identity, and there may be an
    average of the parameters beside them, it is the one with the names of the checkpoint that is to
    be loaded, or else the one that equals the optimizer's parameters.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(model)
    found = {name_of(path): value for path, value in paths if isinstance(value, _VALUES)}
    own = [leaf.name for leaf in leaves]
    candidates = list(_candidates(list(found), own))
    chosen = [names for names in candidates if saved is not None and set(saved).issuperset(names)]
    chosen = chosen or [names for names in candidates if _are_equal(found, names, leaves)]
    names = chosen[0] if chosen else []
    values = {name: value for name, value in found.items() if name not in set(names)}
    return ModelContent(names or [None] * len(leaves), values)


def load_tree(
    model: Any, leaves: Sequence[Leaf], content: ModelContent, values: Mapping[str, Any]
) -> Any:
    """Return a pytree with the values and with the optimizer's parameters."""
    leaf_of = dict(zip(content.names, leaves, strict=True))

    def load(path: Any, old: Any) -> Any:
        name = name_of(path)
        if name in leaf_of and isinstance(old, _VALUES):
            leaf = leaf_of[name]
            return jax.device_put(aligned_copy(leaf.data), leaf.placement)
        return _like(old, values[name]) if name in values else old

    return jax.tree_util.tree_map_with_path(load, model)


def _candidates(found: Sequence[str], own: Sequence[str]) -> Iterator[list[str]]:
    """Yield the names that the parameters have in each subtree that has all their paths."""
    known = set(found)
    first = "" if own == ["params"] else own[0]  # a single array has no path
    for name in found:
        if name.endswith(first):
            prefix = name.removesuffix(first)
            names = [prefix if first == "" else prefix + each for each in own]
            if known.issuperset(names):
                yield names


def _are_equal(found: Mapping[str, Any], names: Sequence[str], leaves: Sequence[Leaf]) -> bool:
    """Whether values have the bits of the parameters."""
    for name, leaf in zip(names, leaves, strict=True):
        value = np.asarray(found[name])
        if (value.dtype, value.shape) != (leaf.data.dtype, leaf.data.shape):
            return False
        if value.tobytes() != leaf.data.tobytes():
            return False
    return True


def _like(old: Any, new: Any) -> Any:
    """Return a loaded value in the form of the one whose place it takes."""
    if isinstance(old, jax.Array):
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            return new
        array = np.asarray(new).astype(old.dtype)
        return jax.device_put(aligned_copy(array), old.sharding if old.committed else None)
    if isinstance(old, np.ndarray):
        return np.array(new, old.dtype)
    return type(old)(new) if isinstance(old, np.generic) else new
