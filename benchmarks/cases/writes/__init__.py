"""Weights that are written after every step, against replicas; and looking for writes."""

from dataclasses import dataclass

from benchmarks.contenders.names import CLAMPED, CLAMPED_REPLICA, THROUGH_TORCH
from benchmarks.harness.case import Case, Claim, Quick, Target, quotient
from benchmarks.harness.options import option

SCAN = "looking for writes"
NUMEL = 1 << 25


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    numel: int = option(NUMEL, "parameters")
    tensors: int = option(16, "arrays they come in")
    rounds: int = option(9, "samples of each contender")


CASE = Case(
    name="writes",
    package=__name__,
    measures="a step and p.clamp_() on all weights, against the same on a replica on each rank",
    start="mpirun -n 2 python -m benchmarks writes",
    options=Options,
    claim=Claim(NUMEL, min_ranks=2),
    ratios=(
        quotient(CLAMPED, CLAMPED_REPLICA, Target(at_most=1.3)),
        quotient(CLAMPED, THROUGH_TORCH, better="less"),
        quotient(SCAN, THROUGH_TORCH, Target(at_most=0.01), name=f"{SCAN} / a step without any"),
    ),
    quick=Quick(("--numel", "1048576", "--rounds", "5"), ranks=2, modules=("torch",)),
)
