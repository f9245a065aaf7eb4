"""The kernel for GPUs has the bits of the one for CPUs: its PTX interpreted, its text as C++."""

import functools
import itertools

import numpy as np
import pytest

from shardopt.layout.dtypes import DTYPES
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from tests.support.cuda import nvrtc
from tests.support.cuda.cases import assert_same_reduction, assert_same_update, hard_arena
from tests.support.cuda.devices import CppDevice, DeviceKernel, PtxDevice, require_compiler
from tests.support.kernel_arrays import SIXTEEN_BITS

UPDATES = [
    (dtype, num_sources, 1 + (row + num_sources) % 3)
    for row, dtype in enumerate(DTYPES)
    for num_sources in range(1, 9)
]
BY_PTX = [each for number, each in enumerate(UPDATES) if (number + number // 8) % 2 == 0]
AS_CPP = [each for each in UPDATES if each not in BY_PTX][::2]
OTHER_GRADS = [
    ("bfloat16", "float32", 1),
    ("float16", "float32", 3),
    ("float64", "bfloat16", 2),
    ("float64", "float16", 3),
    ("float64", "float32", 2),
]
REDUCTIONS = [
    (number, dtype, out_dtype)
    for number, (dtype, out_dtype) in enumerate(itertools.product(DTYPES, [None, *DTYPES]))
]


@functools.cache
def ptx_kernel(number):
    """Return a kernel for one of the architectures, which take turns."""
    nvrtc.require()
    return DeviceKernel(PtxDevice(nvrtc.ARCHITECTURES[number % len(nvrtc.ARCHITECTURES)]))


@pytest.fixture(scope="module")
def cpp_kernel(tmp_path_factory):
    require_compiler()
    return DeviceKernel(CppDevice(tmp_path_factory.mktemp("cpp")))


@pytest.mark.parametrize(("dtype", "num_sources", "num_targets"), BY_PTX)
def test_an_update_by_ptx(dtype, num_sources, num_targets):
    make_arena = functools.partial(hard_arena, num_sources, dtype, num_targets)
    assert_same_update(ptx_kernel(num_sources + num_targets), make_arena)


@pytest.mark.parametrize(
    ("dtype", "architecture"),  # architectures take turns
    [
        pytest.param(
            dtype,
            architecture,
            marks=[pytest.mark.thorough] * ((row - architecture) % len(nvrtc.ARCHITECTURES) != 0),
        )
        for row, dtype in enumerate(DTYPES)
        for architecture in range(len(nvrtc.ARCHITECTURES))
    ],
)
def test_poison_and_no_eps_by_ptx(dtype, architecture):
    poison = np.nan if architecture % 2 else np.inf
    make_arena = functools.partial(hard_arena, 1, dtype, poison=poison)
    assert_same_update(ptx_kernel(architecture), make_arena, eps=0.0)


@pytest.mark.parametrize(("dtype", "grad_dtype", "num_sources"), OTHER_GRADS)
def test_gradients_of_another_dtype_by_ptx(dtype, grad_dtype, num_sources):
    make_arena = functools.partial(hard_arena, num_sources, dtype, grad_dtype=grad_dtype)
    assert_same_update(ptx_kernel(num_sources), make_arena)


@pytest.mark.parametrize(("number", "dtype", "out_dtype"), REDUCTIONS[::2])
def test_a_reduction_by_ptx(number, dtype, out_dtype):
    grads = hard_arena(1 + number % 8, dtype).grads
    factor = 0.3 if number % 3 else 1.0
    assert_same_reduction(ptx_kernel(number), grads, out_dtype, factor)


@pytest.mark.parametrize("poison", [np.inf, np.nan])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_a_reduction_of_part_of_a_span_by_ptx(dtype, poison):
    grads = hard_arena(2, dtype, poison=poison).grads
    for span in (Span(0, CHUNK_NUMEL), Span(CHUNK_NUMEL, 2 * CHUNK_NUMEL)):
        assert_same_reduction(ptx_kernel(1), grads, dtype, span=span)


@pytest.mark.parametrize(("dtype", "num_sources", "num_targets"), AS_CPP)
def test_an_update_as_cpp(cpp_kernel, dtype, num_sources, num_targets):
    make_arena = functools.partial(hard_arena, num_sources, dtype, num_targets)
    assert_same_update(cpp_kernel, make_arena)


@pytest.mark.parametrize(("number", "dtype", "out_dtype"), REDUCTIONS[1::2])
def test_a_reduction_as_cpp(cpp_kernel, number, dtype, out_dtype):
    grads = hard_arena(1 + number % 8, dtype).grads
    for factor in (1.0, 0.3):
        assert_same_reduction(cpp_kernel, grads, out_dtype, factor)
