"""Tests of the JAX front end load JAX when the first of them runs, so that collecting stays cheap.

Each file therefore imports its helpers in a fixture, and binds their names as an import at the top
would.
"""

import pytest

from tests.support.errors import POLICY
from tests.support.frameworks import require


@pytest.fixture(scope="session", autouse=True)
def jax_or_skip() -> None:
    """Load JAX with two devices, or skip the test if it is not installed."""
    require("jax")


@pytest.fixture
def make(comm):
    """Return a maker of transformations that compute as optax does; close what they build."""
    from shardopt.jax import nadam

    residences = []

    def make_one(**settings):
        tx = nadam(**{"lr": 0.1, "variant": "optax", "comm": comm, "policy": POLICY, **settings})

        def init(params):
            state = tx.init(params)
            residences.append(state.residence)
            return state

        return tx._replace(init=init)

    yield make_one
    for residence in residences:
        residence.optimizer.close()
