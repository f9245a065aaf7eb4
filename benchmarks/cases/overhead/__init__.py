"""``step()`` of a model too small to matter, against torch's NAdam, on one rank."""

from dataclasses import dataclass

from benchmarks.contenders.names import FOREACH, SHARDOPT, THROUGH_TORCH
from benchmarks.harness.case import Case, Claim, Quick, Target, quotient
from benchmarks.harness.options import option

NUMEL = 10_000
_TARGET = Target(at_most=1.0)


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    numel: int = option(NUMEL, "parameters")
    tensors: int = option(20, "arrays they come in")
    rounds: int = option(25, "samples of each contender")


CASE = Case(
    name="overhead",
    package=__name__,
    measures="step() of a model too small to matter, on one rank, against torch's NAdam",
    start="python -m benchmarks overhead",
    options=Options,
    claim=Claim(NUMEL),
    ratios=(
        quotient(SHARDOPT, FOREACH, _TARGET),
        quotient(THROUGH_TORCH, FOREACH, _TARGET),
    ),
    quick=Quick(("--rounds", "5")),
)
