"""Training with a transformation of optax, ours on each rank or optax's own on all gradients.

Test files import this when their first test runs, as they do ``jax_trees``.
"""

import numpy as np
import pytest

from tests.support.jax_trees import as_jax, jax, jnp

optax = pytest.importorskip("optax")

__all__ = [
    "as_jax",
    "assert_close",
    "assert_equal",
    "grads_of",
    "jax",
    "jnp",
    "mean_grads",
    "optax",
]
__all__ += ["start", "train"]


def start(dtype="float32"):
    """Return parameters, one of them maybe of 16 bits."""
    weight, bias = np.linspace(-1, 1, 7).astype(dtype), np.ones((2, 3), np.float32)
    return as_jax({"a": weight, "b": [None, bias]})


def grads_of(params, step, rank):
    """Return gradients that depend on everything."""
    return jax.tree.map(lambda leaf: 0.3 * leaf + 0.1 * step - 0.05 * rank, params)


def mean_grads(params, step, comm):
    """Return the average of all ranks' gradients."""
    return grads_of(params, step, (comm.size - 1) / 2)


def train(tx, grads_at, *, through=lambda state: state, steps=5, params=None):
    """Train, passing the state through something before each update."""
    params = start() if params is None else params
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(grads_at(params, step), through(state), params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(ours, theirs):
    """Compare with optax, whose powers of beta are float32."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def assert_equal(left, right):
    """Compare bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, left, right)
