"""The CPU kernel with other states, and for other optimizers, against NAdam's in float32."""

from dataclasses import dataclass

from benchmarks.harness.case import Case, Claim, Quick, Target, quotient
from benchmarks.harness.options import option

NUMEL = 1 << 15  # all that an update touches is in the second-level cache
FLOAT32 = "float32"
CODED = "float32, 8 bits"
BFLOAT16 = "bfloat16, no masters"
BFLOAT16_CODED = "bfloat16, no masters, 8 bits"
OTHER_RULES = "AdamW", "Adam", "RAdam"


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    numel: int = option(NUMEL, "parameters")
    rounds: int = option(101, "samples of each contender")


CASE = Case(
    name="codes",
    package=__name__,
    measures="the CPU kernel with moments of 8 bits and without masters, and for other optimizers, "
    "against NAdam's in float32",
    start="python -m benchmarks codes",
    options=Options,
    claim=Claim(NUMEL),
    ratios=(
        quotient(CODED, FLOAT32, Target(at_most=1.9)),
        quotient(BFLOAT16, FLOAT32),
        quotient(BFLOAT16_CODED, FLOAT32, Target(at_most=2.4)),
        *(quotient(rule, FLOAT32) for rule in OTHER_RULES),  # the same code, other coefficients
    ),
    quick=Quick(("--numel", "8192", "--rounds", "11")),
)
