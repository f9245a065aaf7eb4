"""Stage 2 beside stage 1 on one node: time, and CPU of a rank, of the same steps."""

from dataclasses import dataclass

from benchmarks.cases.training import BATCH, CONTEXT, LAYERS, NUMEL, WIDTH
from benchmarks.contenders.names import (
    ARRAYS,
    ARRAYS_STAGE_2,
    ARRAYS_UPDATED,
    STAGE_2,
    STAGE_2_CLIPPED,
    STAGE_2_UPDATED,
    THROUGH_TORCH,
)
from benchmarks.harness.case import Case, Claim, Quick, Target, paired_quotient
from benchmarks.harness.options import option


def cpu_of(contender: str) -> str:
    """Return the key of the seconds that a contender's ranks compute in a step, on average."""
    return f"{contender}: CPU of a rank"


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    layers: int = option(LAYERS, "transformer blocks")
    width: int = option(WIDTH, "of the model, a multiple of 32")
    context: int = option(CONTEXT, "bytes the model sees at once")
    batch: int = option(BATCH, "sequences of a rank in a step")
    steps: int = option(1, "in a round of each contender")
    rounds: int = option(61, "samples of each contender, after two that warm up")


CASE = Case(
    name="stages",
    package=__name__,
    measures="steps of stage 2 beside those of stage 1, of a small GPT and of gradients at hand",
    start="mpirun -n 2 python -m benchmarks stages",
    options=Options,
    claim=Claim(NUMEL, min_ranks=2, settings={"context": CONTEXT, "batch": BATCH}),
    ratios=(
        paired_quotient(STAGE_2, THROUGH_TORCH, Target(at_most=1.02)),
        paired_quotient(cpu_of(STAGE_2), cpu_of(THROUGH_TORCH), Target(at_most=1.02)),
        paired_quotient(STAGE_2_CLIPPED, STAGE_2, Target(at_most=1.03)),
        paired_quotient(cpu_of(STAGE_2_CLIPPED), cpu_of(STAGE_2), Target(at_most=1.03)),
        paired_quotient(STAGE_2_UPDATED, THROUGH_TORCH, better="less"),
        paired_quotient(cpu_of(STAGE_2_UPDATED), cpu_of(THROUGH_TORCH), Target(at_most=0.9)),
        paired_quotient(ARRAYS_STAGE_2, ARRAYS, better="less"),
        paired_quotient(cpu_of(ARRAYS_STAGE_2), cpu_of(ARRAYS), Target(at_most=0.9)),
        paired_quotient(ARRAYS_UPDATED, ARRAYS, better="less"),
        paired_quotient(cpu_of(ARRAYS_UPDATED), cpu_of(ARRAYS), better="less"),
    ),
    quick=Quick(
        ("--layers", "2", "--width", "64", "--rounds", "7"),
        ranks=2,
        modules=("torch", "threadpoolctl"),
    ),
)
