"""A whole step, gradients in place, against its peers and the bandwidth of memory."""

from dataclasses import dataclass

from benchmarks.contenders.names import (
    AXPY,
    REDUCE_SCATTER,
    REPLICATED,
    SHARDOPT,
    STEP_PEERS,
    THROUGH_TORCH,
    TRIAD,
    ZERO_REDUNDANCY,
)
from benchmarks.harness.case import Case, Claim, Quick, Target, quotient
from benchmarks.harness.options import option

ALL_TRIADS = "triad on all ranks at once"
ALL_AXPYS = "axpy on all ranks at once"
TRIAD_RATE, AXPY_RATE, STEP_RATE = (f"{name}, GB/s" for name in (TRIAD, AXPY, "step"))
LIMIT = "limit of memory, ns/parameter"
NUMEL = 1 << 25

_OVER_OURS = {
    ZERO_REDUNDANCY: Target(at_least=8.0),
    REDUCE_SCATTER: Target(at_least=3.0),
    REPLICATED: None,
}


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    numel: int = option(NUMEL, "parameters")
    tensors: int = option(16, "arrays they come in")
    rounds: int = option(9, "samples of each contender")
    skip: tuple[str, ...] = option((), "peers left out", choices=STEP_PEERS)


CASE = Case(
    name="step",
    package=__name__,
    measures="a whole step, gradients in place, against its peers and the bandwidth of memory",
    start="mpirun -n 2 python -m benchmarks step",
    options=Options,
    claim=Claim(NUMEL, min_ranks=2),
    ratios=(
        *(
            quotient(name, ours, target, better="more")
            for ours in (SHARDOPT, THROUGH_TORCH)
            for name, target in _OVER_OURS.items()
        ),
        quotient(
            TRIAD_RATE,
            STEP_RATE,
            Target(at_most=1.15),
            name=f"{SHARDOPT} / its bytes at triad's rate",
            follows=(SHARDOPT, ALL_TRIADS),
        ),
        quotient(
            AXPY_RATE,
            STEP_RATE,
            name=f"{SHARDOPT} / its bytes at axpy's rate",
            follows=(SHARDOPT, ALL_AXPYS),
            better="less",
        ),
    ),
    quick=Quick(("--numel", "1048576", "--rounds", "5"), ranks=2),
)
