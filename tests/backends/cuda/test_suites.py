"""The suites that every kernel must pass, on interpreted PTX.

All of it takes minutes; test_bits.py is its short form.
"""

import pytest

from tests.support.cuda import nvrtc
from tests.support.cuda.devices import DeviceKernel, PtxDevice
from tests.support.kernel_suite import (
    BitSuite,
    MasterSuite,
    ReduceSuite,
    UpdateSuite,
    WideSumSuite,
)

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=nvrtc.ARCHITECTURES)
def kernel(request):
    nvrtc.require()
    return DeviceKernel(PtxDevice(request.param))


class TestCudaKernelUpdate(UpdateSuite):
    pass


class TestCudaKernelReduce(ReduceSuite):
    pass


class TestCudaKernelWideSums(WideSumSuite):
    pass


class TestCudaKernelBits(BitSuite):
    pass


class TestCudaKernelMasters(MasterSuite):
    test_small_updates_add_up = None  # 2,000 steps
