"""The CPU kernel passes the suites on one thread and on several, and its loops are vectorised."""

import platform
import re

import numba
import numpy as np
import pytest

from shardopt.backends.base import Rows, UpdatePlan
from shardopt.backends.cpu import elements, loops, sums
from shardopt.backends.cpu import kernel as cpu
from shardopt.errors import KernelError
from shardopt.layout.dtypes import DTYPES, compute_dtype, has_master
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.layout.state_spec import state_specs
from shardopt.rule.coefficients import NUM_COEFFICIENTS
from tests.support.kernel_arrays import (
    SIXTEEN_BITS,
    HostKernel,
    assert_same_bits,
    cast,
    coefficient_rows,
    every_pattern,
    hard_to_round,
)
from tests.support.kernel_suite import (
    BitSuite,
    MasterSuite,
    ReduceSuite,
    UpdateSuite,
    WideSumSuite,
)


@pytest.fixture(scope="module", params=[1, 3])
def kernel(request):
    kernel = cpu.CpuKernel(threads=request.param)
    yield HostKernel(kernel)
    kernel.close()


class TestCpuKernelUpdate(UpdateSuite):
    pass


class TestCpuKernelReduce(ReduceSuite):
    pass


class TestCpuKernelWideSums(WideSumSuite):
    pass


class TestCpuKernelBits(BitSuite):
    pass


class TestCpuKernelMasters(MasterSuite):
    pass


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype):
    numel = 5 * cpu.MIN_PIECE_NUMEL + CHUNK_NUMEL
    span = Span(0, numel)
    sources = Rows.of(*np.random.default_rng(0).standard_normal((2, numel)).astype(dtype))
    segments = np.array([[0, 999, 0], [1024, numel, 0]])
    plan = UpdatePlan(span, segments, coefficient_rows(dtype, (1, 0.5)))
    results = []
    for threads in (1, 2, 5):
        kernel = cpu.CpuKernel(threads)
        params, square_sums = np.ones((2, numel), dtype), np.empty(numel // CHUNK_NUMEL)
        state = {
            key: np.zeros(numel, compute_dtype(dtype))
            for key in (each.key for each in state_specs(dtype))
        }
        if has_master(dtype):
            state["master"][:] = 1
        values = np.zeros(numel, dtype)
        kernel.update(sources, Rows.of(*params), state, plan)
        kernel.reduce(sources, None if has_master(dtype) else values, span, square_sums)
        kernel.close()
        results.append([*params, *state.values(), square_sums, values])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", ["int16", "uint16", "complex64"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(KernelError, match=f"float16, bfloat16, float32, float64; got {dtype}"):
        cpu.CpuKernel().prepare(dtype)


CONVERSIONS = [
    ("bfloat16", elements.widen_bfloat16, elements.narrow_bfloat16),
    ("float16", elements.widen_float16_by_bits, elements.narrow_float16_by_bits),
    ("float16", elements.widen_float16, elements.narrow_float16),
]
if not elements.converts_float16():
    CONVERSIONS.pop()


@pytest.mark.parametrize(("dtype", "widen", "narrow"), CONVERSIONS)
def test_conversions_are_those_of_numpy(dtype, widen, narrow):
    patterns, values = every_pattern(dtype), hard_to_round(dtype)
    stand_in = elements.STAND_INS[np.dtype(dtype)]
    widened, narrowed = np.empty(patterns.size, np.float32), np.empty(values.size, stand_in)
    widen, narrow = numba.njit(widen), numba.njit(narrow)

    @numba.njit
    def convert(patterns, widened, values, narrowed):
        for i in range(patterns.size):
            widened[i] = widen(patterns[i])
        for i in range(values.size):
            narrowed[i] = narrow(values[i], narrowed[i])

    convert(patterns.view(stand_in), widened, values, narrowed)
    assert_same_bits(widened, cast(patterns, np.float32))
    assert_same_bits(narrowed.view(dtype), cast(values, dtype))


def assembly(function, *arguments):
    """Compile afresh, not from the cache."""
    compiled = numba.njit(error_model="numpy")(getattr(function, "py_func", function))
    compiled(*arguments)
    return "\n".join(compiled.inspect_asm().values())


x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for x86 instructions")


@x86_only
@pytest.mark.parametrize("dtype", ["float32", *SIXTEEN_BITS])
def test_the_update_is_vectorised_without_fused_multiply_adds(dtype):
    param = np.ones(8, dtype).view(elements.STAND_INS.get(np.dtype(dtype), dtype))
    code = assembly(
        loops.update_block,
        np.ones(8, np.float32),
        param,
        *np.ones((4, NUM_COEFFICIENTS), np.float32),
    )
    assert re.search(r"\bv?sqrtps\b", code)
    assert not re.search(r"\bvfn?m(add|sub)", code)


@x86_only
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_conversions_are_vectorised(dtype):
    bits = np.ones(8, elements.STAND_INS[np.dtype(dtype)])
    values = np.ones(8, np.float32)
    by_instruction = dtype == "float16" and elements.converts_float16()
    widen = r"\bvcvtph2psx?\b.*[xy]mm" if by_instruction else r"\bv?pslld\b"
    narrow = r"\bvcvtps2ph(x[xy]?)?\b.*[xy]mm" if by_instruction else r"\bv?psrld\b"
    assert re.search(widen, assembly(sums._accumulate, values, bits))
    assert re.search(narrow, assembly(elements.round_to, values, bits))
