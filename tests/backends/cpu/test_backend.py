"""The CPU backend passes the suites and adds no wait and no copy."""

import numpy as np
import pytest

from shardopt.backends.base import Backend
from shardopt.backends.cpu.backend import CpuBackend
from tests.support.backend_suite import BackendSuite


@pytest.fixture(scope="module")
def backend():
    backend: Backend = CpuBackend(threads=2)
    yield backend
    backend.close()


class TestCpuBackend(BackendSuite):
    @pytest.fixture
    def zeros(self):
        return np.zeros

    def test_its_arrays_are_on_the_host(self, backend):
        array = backend.host_zeros(5, "float32")
        assert backend.host(array) is array
        assert backend.event().is_done()

    def test_copies_convert_nothing(self, backend):
        with pytest.raises(TypeError):
            backend.copy(np.zeros(3, np.float32), np.zeros(3, np.float64))
        with pytest.raises(AssertionError):
            backend.copy(np.zeros(3), np.zeros(1))
