"""A whole step through each framework that is installed."""

from dataclasses import dataclass

from benchmarks.contenders.names import (
    SHARDOPT,
    THROUGH_JAX,
    THROUGH_LUCID,
    THROUGH_TORCH,
    THROUGH_TORCH_BFLOAT16,
)
from benchmarks.harness.case import Case, Claim, Quick, quotient
from benchmarks.harness.options import option

NUMEL = 1 << 25


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    numel: int = option(NUMEL, "parameters")
    tensors: int = option(16, "arrays they come in")
    rounds: int = option(9, "samples of each contender")


CASE = Case(
    name="faces",
    package=__name__,
    measures="a whole step through each framework that is installed",
    start="mpirun -n 2 python -m benchmarks faces",
    options=Options,
    claim=Claim(NUMEL, min_ranks=2),
    ratios=tuple(
        quotient(face, SHARDOPT, better="less")
        for face in (THROUGH_TORCH, THROUGH_TORCH_BFLOAT16, THROUGH_JAX, THROUGH_LUCID)
    ),
    quick=Quick(("--numel", "1048576", "--rounds", "5"), ranks=2),
)
