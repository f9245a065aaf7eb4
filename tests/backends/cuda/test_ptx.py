"""The PTX of the kernel: named operations, wide accesses, few registers, no local memory."""

import itertools

import pytest

from shardopt.backends.cuda.kernel import SOURCE, reduce_variant, update_variant
from shardopt.layout.dtypes import DTYPES
from tests.support.cuda import nvrtc
from tests.support.cuda.ptx_program import Program

VARIANTS = [
    *(update_variant(dtype, dtype, 1, 1) for dtype in DTYPES),
    update_variant("float32", "bfloat16", 1, 1),
    update_variant("float32", "float32", 8, 8),
    update_variant("bfloat16", "bfloat16", 8, 8),
    *(reduce_variant(dtype, dtype, 1) for dtype in DTYPES),
    reduce_variant("float16", None, 1),
    reduce_variant("bfloat16", "float64", 2),
]
BLOCKS = {"FLOAT16": 2, "BFLOAT16": 2, "FLOAT32": 4, "FLOAT64": 3}
"""Blocks of an update of one source that a multiprocessor runs at once, at least."""

NARROW = {
    *(f"ld.global.{kind}{bits}" for kind in "bsu" for bits in (32, 64)),  # of segments
    *("st.global.f64", "st.global.b64"),  # a sum of squares
    *("atom.global.min.s64", "red.global.min.s64"),  # the flag
}
"""Accesses of less than 16 bytes."""

REGISTERS = 65536
ARGUMENT_NBYTES = 4096
"""What every driver accepts."""


def name_of(variant):
    macros = dict(variant.macros)
    to = macros.get("PARAM", macros.get("OUT"))
    return f"{variant.name}-{macros['SOURCES']}-{macros['GRAD']}-{to}"


def compiled(variant, architecture, *options):
    nvrtc.require()
    text = SOURCE.read_text(encoding="utf-8")
    return nvrtc.compile_text(text, (*variant.options, *options), architecture)


every_build = pytest.mark.parametrize(
    ("variant", "architecture"),
    [
        pytest.param(variant, architecture, id=f"{name_of(variant)}-{architecture}")
        for variant, architecture in itertools.product(VARIANTS, nvrtc.ARCHITECTURES)
    ],
)


@every_build
def test_operations_round_once_and_accesses_are_wide(variant, architecture):
    program = Program(compiled(variant, architecture).ptx, variant.name)
    assert ".local" not in program.body
    for opcode in program.counts():
        op, *modifiers = opcode.split(".")
        assert op != "fma", opcode
        assert not {"ftz", "approx", "full"}.intersection(modifiers), opcode
        if op in ("ld", "st", "atom", "red"):  # else it is looked up where an address leads
            assert modifiers[0] in ("global", "param", "shared"), opcode
            assert modifiers[0] != "global" or modifiers[1] == "v4" or opcode in NARROW, opcode


@every_build
def test_registers_let_enough_threads_run(variant, architecture):
    used = compiled(variant, architecture).resources()[variant.name]
    assert used["STACK"] == used["LOCAL"] == 0  # nothing is spilled
    macros = dict(variant.macros)
    blocks = BLOCKS[macros["PARAM"]] if variant.name == "update" else 3
    if macros["SOURCES"] == 8:
        blocks = 2
    assert used["REG"] <= REGISTERS // (blocks * macros["THREADS"])


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[2], VARIANTS[-1]], ids=name_of)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--use_fast_math",), id="fast"),
        pytest.param(("-fmad=true", "-prec-div=false", "-prec-sqrt=false"), id="imprecise"),
        pytest.param(("-fmad=false", "-ftz=false"), id="careful"),
    ],
)
def test_no_option_changes_the_code(variant, options):
    def code(*options):
        ptx = compiled(variant, "sm_90", *options).ptx
        return [each.text for each in Program(ptx, variant.name).code]

    assert code(*options) == code()


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_the_arguments_are_those_that_are_packed(variant):
    program = Program(compiled(variant, "sm_90").ptx, variant.name)
    assert program.params_nbytes == variant.arguments.itemsize <= ARGUMENT_NBYTES
