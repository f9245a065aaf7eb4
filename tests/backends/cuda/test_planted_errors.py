"""What the tests of this folder would miss: errors are planted in the kernel, and all are found.

One of each kind runs always, the others with ``tests/run.sh --all``.
"""

import functools
import re

import pytest

from shardopt.backends.cuda.kernel import SOURCE
from tests.support.cuda import nvrtc
from tests.support.cuda.cases import (
    assert_flat_index_is_told,
    assert_overflow_is_told,
    assert_same_reduction,
    assert_same_update,
    hard_arena,
)
from tests.support.cuda.devices import DeviceKernel, PtxDevice
from tests.support.cuda.memory import AccessError
from tests.support.cuda.ptx_machine import UnknownInstructionError

FOUND = AssertionError, AccessError, UnknownInstructionError
OFFSET = r"threadIdx\.x \* LANES; offset"
OPERATORS = r"#define OPERATOR\(.*?\n  }\n"
PLAIN = (
    "#define OPERATOR(Number, kind, sign, instruction) "
    "DEVICE Number operator sign(Number a, Number b) { return Number{a.value sign b.value}; }\n"
)


def kernel_of(pattern="", replacement="", *options):
    """Return a kernel of a changed text, compiled with more options."""
    nvrtc.require()
    text, count = re.subn(pattern, lambda _: replacement, SOURCE.read_text("utf-8"), flags=re.S)
    assert count

    def compile_text(_, macros, architecture):
        return nvrtc.compile_text(text, (*macros, *options), architecture)

    return DeviceKernel(PtxDevice(compile_text=compile_text))


def check_update(kernel, dtype="float32", num_sources=4):
    assert_same_update(kernel, functools.partial(hard_arena, num_sources, dtype, 2))


def check_reduce(kernel, dtype="float32"):
    assert_same_reduction(kernel, hard_arena(3, dtype).grads, dtype, factor=0.3)


def check_flag(kernel):
    assert_flat_index_is_told(kernel, "bfloat16")
    assert_overflow_is_told(kernel, "bfloat16")


UPDATES = {
    "operations fused by the compiler": (OPERATORS, PLAIN),
    "subnormals flushed": (OPERATORS, PLAIN, "-fmad=false"),
    "a sum from left to right": (r"2 \* left_half\(\(count \+ 1\) / 2\)", "count - 1"),
    "another order of a product": (r"\(c\.v_gain \* g\) \* g", "c.v_gain * (g * g)"),
    "epsilon within the root": (r"root\(v_hat\) \+ c\.eps", "root(v_hat + c.eps)"),
    "gaps written": (r"stop - first == LANES", "true"),
    "one element too many": (r"lane < stop", "lane <= stop"),
    "a segment passed over": (r"stop <= position\)", "stop <= position + 1)"),
    "one segment for all lanes": (r"if \(first >= LANES\) break;", "if (each > number) break;"),
    "one chunk too far": (r"\(i64\)blockIdx\.x \* CHUNK;", "(i64)(blockIdx.x + 1) * CHUNK;"),
    "an address that is not aligned": (
        OFFSET,
        "threadIdx.x * LANES + 1; offset",
    ),
    "two threads at one place": (
        OFFSET,
        "threadIdx.x / 2 * LANES; offset",
    ),
    "one set of coefficients": (r"cohorts\[segments\[each\]\.cohort\]", "cohorts[0]"),
    "a target left out": (r"i < TARGETS", "i < TARGETS - 1"),
}
MASTERS = {
    "written parameters ignored": (r"if \(!\(differs & .*?\)\) r\.at", "r.at"),
    "parameters in place of masters": (r"if \(!\(differs & .*?\)\) r\.at", "if (false) r.at"),
    "rounded towards zero": (r"cvt\.rn\.bf16x2", "cvt.rz.bf16x2"),
    "halves exchanged": (
        r"i % 2 \? pair & 0xFFFF0000u : pair << 16",
        "i % 2 ? pair << 16 : pair & 0xFFFF0000u",
    ),
}
REDUCTIONS = {
    "no barrier": (r"__syncthreads\(\);", ""),
    "accumulators added backwards": (
        r"squares\[threadIdx\.x \* LANES \+ i\];",
        "squares[threadIdx.x * LANES + ACCUMULATORS - 1 - i];",
    ),
    "squares in the dtype of the sum": (
        r"to_double\(total\) \* to_double\(total\)",
        "to_double(total * total)",
    ),
    "no factor": (r" \* args\.factor", ""),
    "one block too many": (r"if \(chunk >= args\.num_chunks\) return;", ""),
}
FLAGS = {
    "no flag": (r"if \(!finite\) atomicMin", "if (false) atomicMin"),
    "the position in the rows": (r"args\.origin \+ chunk", "chunk"),
    "the flag of all blocks": (r"args\.origin \+ chunk\)", "args.origin + args.start)"),
    "the masters in place of parameters": (r"widen<PARAM>\(params\);\n  bool", "p;\n  bool"),
}
HARMLESS = {
    "as it is": ("", ""),
    "another loop": (r"#pragma unroll 8", "#pragma unroll 4"),
    "fast math": ("", "", "--use_fast_math"),
}


def first_of(names):
    """All names, of which only the first is not marked thorough."""
    first, *rest = names
    return [first, *(pytest.param(name, marks=pytest.mark.thorough) for name in rest)]


@pytest.mark.parametrize("name", first_of(UPDATES))
def test_an_error_in_the_update_is_found(name):
    kernel = kernel_of(*UPDATES[name])
    with pytest.raises(FOUND):
        check_update(kernel)


@pytest.mark.parametrize("name", first_of(MASTERS))
def test_an_error_with_masters_is_found(name):
    kernel = kernel_of(*MASTERS[name])
    with pytest.raises(FOUND):
        check_update(kernel, "bfloat16", 1)


@pytest.mark.parametrize("name", first_of(REDUCTIONS))
def test_an_error_in_the_reduction_is_found(name):
    kernel = kernel_of(*REDUCTIONS[name])
    with pytest.raises(FOUND):
        check_reduce(kernel)


@pytest.mark.parametrize("name", first_of(FLAGS))
def test_an_error_in_the_flag_is_found(name):
    kernel = kernel_of(*FLAGS[name])
    with pytest.raises(FOUND):
        check_flag(kernel)


@pytest.mark.parametrize("name", first_of(HARMLESS))
def test_a_harmless_change_passes(name):
    kernel = kernel_of(*HARMLESS[name])
    check_update(kernel)
    check_reduce(kernel)
    check_flag(kernel)
