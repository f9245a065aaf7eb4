"""The reference kernel passes the suites."""

import pytest

from shardopt.backends.reference import ReferenceKernel
from tests.support.kernel_arrays import HostKernel
from tests.support.kernel_suite import MasterSuite, ReduceSuite, UpdateSuite, WideSumSuite


@pytest.fixture
def kernel():
    return HostKernel(ReferenceKernel())


class TestReferenceKernelUpdate(UpdateSuite):
    pass


class TestReferenceKernelReduce(ReduceSuite):
    pass


class TestReferenceKernelWideSums(WideSumSuite):
    pass


class TestReferenceKernelMasters(MasterSuite):
    pass
