"""The kernel on a GPU has the bits of the kernel for CPUs."""

import functools
import itertools

import numpy as np
import pytest

from shardopt.layout.dtypes import DTYPES
from tests.support.cuda.cases import assert_same_reduction, assert_same_update, hard_arena
from tests.support.kernel_suite import (
    BitSuite,
    MasterSuite,
    ReduceSuite,
    UpdateSuite,
    WideSumSuite,
)

pytestmark = pytest.mark.gpu

SOURCES_AND_TARGETS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (4, 4), (5, 1), (7, 2), (8, 8)]
GRADS = [
    (param, grad)
    for param, grad in itertools.product(DTYPES, DTYPES)
    if grad in (param, "float32") or param == "float64"
]
REDUCTIONS = list(itertools.product(DTYPES, [None, *DTYPES], [1, 2, 3, 8]))


@pytest.fixture(scope="module")
def kernel(gpu):
    return gpu.kernel()


@pytest.mark.parametrize(("num_sources", "num_targets"), SOURCES_AND_TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update(kernel, dtype, num_sources, num_targets):
    make_arena = functools.partial(hard_arena, num_sources, dtype, num_targets)
    assert_same_update(kernel, make_arena)


@pytest.mark.parametrize(("dtype", "grad_dtype"), GRADS)
def test_gradients_of_another_dtype(kernel, dtype, grad_dtype):
    make_arena = functools.partial(hard_arena, 1, dtype, grad_dtype=grad_dtype)
    assert_same_update(kernel, make_arena)


@pytest.mark.parametrize("poison", [np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_and_no_eps(kernel, dtype, poison):
    make_arena = functools.partial(hard_arena, 2, dtype, poison=poison)
    assert_same_update(kernel, make_arena, eps=0.0)


@pytest.mark.parametrize(("dtype", "out_dtype", "num_sources"), REDUCTIONS)
def test_a_reduction(kernel, dtype, out_dtype, num_sources):
    if out_dtype is None and num_sources > 1:
        pytest.skip("a kernel only measures a sum that is there")
    grads = hard_arena(num_sources, dtype).grads
    for factor in (1.0, 0.3):
        assert_same_reduction(kernel, grads, out_dtype, factor)


class TestUpdate(UpdateSuite):
    pass


class TestReduce(ReduceSuite):
    pass


class TestWideSums(WideSumSuite):
    pass


class TestBits(BitSuite):
    pass


class TestMasters(MasterSuite):
    pass
