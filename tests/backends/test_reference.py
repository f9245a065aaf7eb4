"""The reference kernel keeps the promises."""

import pytest

from shardopt.backends.reference import ReferenceKernel
from tests.support.kernel_suite import KernelSuite, MasterSuite


@pytest.fixture
def kernel():
    return ReferenceKernel()


class TestReferenceKernel(KernelSuite):
    pass


class TestReferenceKernelMasters(MasterSuite):
    pass
