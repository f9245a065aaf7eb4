"""Fixtures of tests on devices, which are also checked for the order of what devices do."""

import functools

import pytest

from tests.support.arena_device import in_order
from tests.support.device_training import WAYS, Pair


@pytest.fixture(autouse=True)
def ordered_accesses():
    """Have a test fail if nothing orders what devices and hosts do to node memory."""
    with in_order():  # tests that plant errors take them
        yield


@pytest.fixture(params=WAYS)
def way(request):
    """One of the three ways of gradients and parameters."""
    return request.param


@pytest.fixture
def make_pair(comm, monkeypatch, way):
    """Return a function that makes an optimizer on devices and one on CPUs; see ``Pair``."""
    return functools.partial(Pair, comm, monkeypatch, way)
