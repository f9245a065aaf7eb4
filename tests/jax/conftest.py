"""Tests of the JAX front end load JAX when the first of them runs, so that collecting stays cheap.

Each file therefore imports its helpers in a fixture, and binds their names as an import at the top
would.
"""

import pytest

from tests.support.frameworks import require


@pytest.fixture(scope="session", autouse=True)
def jax_or_skip() -> None:
    """Load JAX with two devices, or skip the test if it is not installed."""
    require("jax")
