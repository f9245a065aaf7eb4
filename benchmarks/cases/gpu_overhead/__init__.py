"""``step()`` of a model too small to matter on one GPU, against torch's NAdam there."""

from dataclasses import dataclass

from benchmarks.contenders.names import FOREACH, SHARDOPT, THROUGH_TORCH
from benchmarks.harness.case import Case, Claim, Target, quotient
from benchmarks.harness.options import option

NUMEL = 10_000
_TARGET = Target(at_most=1.0)


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    numel: int = option(NUMEL, "parameters")
    tensors: int = option(20, "arrays they come in")
    device: str = option("cuda", "what to run on", choices=("cuda", "stand-in"))
    rounds: int = option(20, "samples of each contender")


CASE = Case(
    name="gpu_overhead",
    package=__name__,
    measures="step() of a model too small to matter on one GPU, against torch's NAdam there",
    start="python -m benchmarks gpu_overhead",
    options=Options,
    claim=Claim(NUMEL, settings={"device": "cuda"}),
    ratios=(
        quotient(SHARDOPT, FOREACH, _TARGET),
        quotient(THROUGH_TORCH, FOREACH, _TARGET),
    ),
    quick="it needs a GPU",
)
