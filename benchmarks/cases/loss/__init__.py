"""The loss of a small language model with less of the optimizer's state, against float32.

All contenders compute in float32, so that they differ only in the dtypes of the weights, gradients
and state that they keep. Each piece of the work, a run of one contender with one seed, is added to
a file once it is done, so that the case may be stopped and started again, or limited to a few
pieces at a time.
"""

from dataclasses import dataclass

from benchmarks.harness.case import Case, Claim, Target, figure
from benchmarks.harness.options import option

FLOAT32 = "float32"
CODED = "float32, 8 bits"
BFLOAT16 = "bfloat16, no masters"
BFLOAT16_CODED = "bfloat16, no masters, 8 bits"
NEAREST = "bfloat16 rounded to the nearest, no masters"
CONTENDERS = (FLOAT32, CODED, BFLOAT16, BFLOAT16_CODED, NEAREST)
STEPS = 2000
SEEDS = (0, 1, 2, 3, 4)
PIECES = "benchmarks/results/loss/pieces.jsonl"


def farthest(name: str) -> str:
    """Return the key of the end of the 95 % interval of a difference that is farther from 0."""
    return f"{name} - {FLOAT32}: farther end of the interval"


def lowest(name: str) -> str:
    """Return the key of the lower end of the same interval."""
    return f"{name} - {FLOAT32}: lower end of the interval"


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    steps: int = option(STEPS, "steps of each run")
    seeds: tuple[int, ...] = option(SEEDS, "seeds of model and batches, one run for each")
    width: int = option(128, "of the model")
    pieces: str = option(PIECES, "file of the pieces that are done")
    at_most: int = option(1000, "pieces to do now")


CASE = Case(
    name="loss",
    package=__name__,
    measures="held-out loss with moments of 8 bits and without masters, paired with float32",
    start="python -m benchmarks loss",
    options=Options,
    claim=Claim(None, settings={"steps": STEPS, "seeds": list(SEEDS)}),
    ratios=(
        *(
            figure(farthest(name), Target(at_most=0.01))
            for name in (CODED, BFLOAT16, BFLOAT16_CODED)
        ),
        figure(lowest(NEAREST), Target(at_least=1e-6)),
    ),
    quick="it needs more than an hour",
)
