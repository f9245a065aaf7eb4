"""Trees of arrays for the tests of the JAX front end.

Test files import this when their first test runs: it loads JAX, and collecting tests must stay
cheap.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from tests.support.frameworks import require

jax = require("jax")
jnp = jax.numpy


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    """A node that is a dataclass."""

    kernel: Any
    bias: Any


class Pair(NamedTuple):
    """A node that is a named tuple."""

    left: Any
    right: Any


def as_tree(values):
    """Return nine values in a tree that flattens to their order."""
    a, b, c, d, e, f, g, h, i = values
    return {"a": [a, b], "b": (c, None, Pair(d, e)), "c": Block(f, g), "d": {"x": h, "y": {"z": i}}}


NAMES = ["['a'][0]", "['a'][1]", "['b'][0]", "['b'][2].left", "['b'][2].right"]
NAMES += ["['c'].kernel", "['c'].bias", "['d']['x']", "['d']['y']['z']"]
"""The names of the nine leaves."""


def as_jax(values):
    """Return a tree with its leaves as jax arrays."""
    return jax.tree.map(jnp.asarray, values)


def assert_tree(tree, values):
    """Check that the tree is ``as_tree`` of jax arrays with these values, bit for bit."""
    assert jax.tree.structure(tree) == jax.tree.structure(as_tree(values))
    for leaf, value in zip(jax.tree.leaves(tree), values, strict=True):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == value.dtype
        np.testing.assert_array_equal(leaf, value)


def ones(*shape, dtype="float32"):
    """Return a jax array of ones."""
    return jnp.asarray(np.ones(shape, dtype))  # jnp.ones would have to be compiled


def small(value=1.0):
    """Return two parameters, or their gradients, that are ``value`` everywhere."""
    return as_jax({"b": np.full(5, value, np.float32), "w": np.full((2, 3), value, np.float32)})
