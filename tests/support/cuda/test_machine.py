"""What runs the PTX in the tests: it computes as hardware does, and misses no error."""

import numpy as np
import pytest

from tests.support.cuda.memory import AccessError, Memory
from tests.support.cuda.ptx_machine import (
    Machine,
    UnknownInstructionError,
    _bfloat_bits,
    _half_bits,
)
from tests.support.cuda.ptx_program import Program
from tests.support.kernel_arrays import cast, hard_to_round

HEAD = ".visible .entry test(.param .u64 test_param_0)\n{\n.reg .b64 %rd<9>;\n"
HEAD += "ld.param.u64 %rd1, [test_param_0];\nmov.u32 %r1, %tid.x;\n"
HEAD += "mul.wide.u32 %rd2, %r1, 4;\nadd.s64 %rd3, %rd1, %rd2;\nld.global.f32 %f1, [%rd3];\n"
SHARED = ".shared .align 4 .b8 shared[64];\n"
BRANCH = "setp.gt.u32 %p1, %r1, 3;\n@%p1 bra $LATER;\nadd.rn.f32 %f1, %f1, %f1;\n$LATER:\n"


def run(body, values, blocks=1):
    """Let each thread load an element, run the body, and store %f2."""
    memory = Memory()
    array = memory.array(np.asarray(values, np.float32))
    program = Program(f"{SHARED}{HEAD}{body}\nst.global.f32 [%rd3], %f2;\nret;\n}}", "test")
    Machine(program, memory).launch(blocks, array.size, np.array([array.ctypes.data]).tobytes())
    return array


def finite_or_zero(values):
    return np.where(np.isfinite(values), values, 0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.rn.f32 %f2, %f1, 0f3F800000;", lambda x: x + np.float32(1)),
        ("mul.rn.f32 %f2, %f1, 0f00000001;", lambda x: x * np.float32(1e-45)),
        ("div.rn.f32 %f2, %f1, 0f40400000;", lambda x: x / np.float32(3)),
        ("sqrt.rn.f32 %f2, %f1;", np.sqrt),
        (f"{BRANCH}mov.f32 %f2, %f1;", lambda x: np.where(np.arange(8) > 3, x, x + x)),
        ("mov.b32 %r2, %f1;\nshr.u32 %r3, %r2, 31;\ncvt.rn.f32.u32 %f2, %r3;", np.signbit),
        (
            "{.reg .pred holds; testp.finite.f32 holds, %f1; selp.f32 %f2, %f1, 0f0, holds;}",
            finite_or_zero,
        ),
    ],
)
def test_instructions_compute_as_they_should(body, expected):
    values = np.array([1, 2, 3e-45, -0.0, 5, -6, 1e38, np.inf], np.float32)
    with np.errstate(invalid="ignore"):
        result = expected(values).astype(np.float32)
    np.testing.assert_array_equal(run(body, values), result)


@pytest.mark.parametrize(
    "body",
    [
        "add.f32 %f2, %f1, %f1;",  # which ptxas may fuse with a product
        "add.rz.f32 %f2, %f1, %f1;",
        "add.rn.ftz.f32 %f2, %f1, %f1;",
        "div.approx.f32 %f2, %f1, %f1;",
        "fma.rn.f32 %f2, %f1, %f1, %f1;",
        "mad.rn.f32 %f2, %f1, %f1, %f1;",
        "cvt.rz.f32.f64 %f2, %rd2;",
        "cvt.f32.f64 %f2, %rd2;",
        "ld.f32 %f2, [%rd3];",
        "mov.f32 %f2, %f77;",
        "frobnicate.f32 %f2, %f1;",
    ],
)
def test_what_does_not_round_once_or_is_unknown_is_refused(body):
    with pytest.raises(UnknownInstructionError):
        run(body, np.ones(8))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("ld.global.f32 %f2, [%rd3+4];", "out of bounds"),
        ("ld.global.f32 %f2, [%rd3+-4];", "out of bounds"),
        ("ld.global.f32 %f2, [%rd3+2];", "not aligned"),
        ("st.global.f32 [%rd1], %f1;", "two threads"),
        ("st.shared.f32 [shared], %f1;", "two threads"),
        ("st.shared.f32 [shared+61], %f1;", "out of the shared memory"),
        (
            "st.shared.f32 [%rd2], %f1;\nld.shared.f32 %f2, [shared];",
            "another thread",
        ),
    ],
)
def test_accesses_that_hardware_would_not_report_are_errors(body, reason):
    with pytest.raises(AccessError, match=reason):
        run(body, np.ones(8))


def test_a_barrier_lets_threads_read_what_others_wrote():
    body = "mov.u64 %rd5, shared;\nadd.s64 %rd4, %rd2, %rd5;\nst.shared.f32 [%rd4], %f1;\n"
    body += "bar.sync 0;\nld.shared.f32 %f2, [shared+8];"
    np.testing.assert_array_equal(run(body, np.arange(8)), np.full(8, 2))


@pytest.mark.parametrize(
    ("dtype", "convert"), [("bfloat16", _bfloat_bits), ("float16", _half_bits)]
)
def test_rounding_to_16_bits_is_that_of_numpy(dtype, convert):
    values = hard_to_round(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        bits = convert(values).astype(np.uint16)
    expected = cast(values, dtype)
    is_nan = np.isnan(expected)
    assert (bits == expected.view(np.uint16))[~is_nan].all()
    assert np.isnan(bits.view(dtype))[is_nan].all()


def test_memory_that_is_freed_cannot_be_accessed():
    memory = Memory()
    first, second = memory.array(np.zeros(3)), memory.array(np.zeros(5))
    address = np.array([first.ctypes.data])
    assert memory.offsets(address, 8, "ld") == address - memory.base
    assert memory.accesses_of(first) == {("ld", 8)}
    memory.free(first)
    with pytest.raises(AccessError):
        memory.offsets(address, 8, "ld")
    assert memory.array(np.zeros(3)).ctypes.data == first.ctypes.data
    assert second.ctypes.data % 256 == 0
