"""The CPU kernel keeps the promises, on one thread and on several, and its loops are vectorised."""

import platform
import re

import numba
import numpy as np
import pytest

import shardopt.kernels.cpu as cpu
from shardopt.errors import KernelError
from shardopt.kernels.base import UpdatePlan
from shardopt.partition import CHUNK_NUMEL
from tests.kernels.suite import BitSuite, KernelSuite, coefficient_rows


@pytest.fixture(scope="module", params=[1, 3])
def kernel(request):
    kernel = cpu.CpuKernel(threads=request.param)
    yield kernel
    kernel.close()


class TestCpuKernel(KernelSuite):
    pass


class TestCpuKernelBits(BitSuite):
    pass


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_change_no_bit(dtype):
    numel = 5 * cpu.MIN_PIECE_NUMEL + CHUNK_NUMEL
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((2, numel)).astype(dtype)
    results = []
    for threads in (1, 2, 5):
        kernel = cpu.CpuKernel(threads)
        arrays = [np.ones(numel, dtype), np.zeros(numel, dtype), np.zeros(numel, dtype)]
        segments = np.array([[0, 999, 0], [1024, numel, 0]])
        plan = UpdatePlan(0, numel, segments, coefficient_rows(dtype, (1, 0.5)))
        summed, square_sums = np.empty(numel, dtype), np.empty(numel // CHUNK_NUMEL)
        kernel.update(grads, *arrays, plan)
        kernel.reduce(grads, summed, 0, numel, square_sums)
        kernel.close()
        results.append([*arrays, summed, square_sums])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", ["float16", "int32", "complex64"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(KernelError, match=f"float32, float64; got {dtype}"):
        cpu.CpuKernel().prepare(dtype)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for x86 instructions")
def test_the_update_is_vectorised_without_fused_multiply_adds():
    compiled = numba.njit(error_model="numpy")(cpu._update_block.py_func)  # afresh: not the cache
    compiled(*np.ones((4, 8), np.float32), np.ones(11, np.float32))
    assembly = "\n".join(compiled.inspect_asm().values())
    assert re.search(r"\bv?sqrtps\b", assembly)
    assert not re.search(r"\bvfn?m(add|sub)", assembly)
