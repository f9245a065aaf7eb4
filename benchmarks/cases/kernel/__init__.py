"""The CPU kernel against bare loops over memory and torch's NAdam, on as many threads."""

from dataclasses import dataclass

from benchmarks.contenders.names import AXPY, FOREACH, TRIAD
from benchmarks.harness.case import Case, Claim, Quick, Target, quotient
from benchmarks.harness.options import option

KERNEL = "kernel"
TRIAD_RATE, AXPY_RATE, KERNEL_RATE = (f"{name}, GB/s" for name in (TRIAD, AXPY, KERNEL))
NUMEL = 1 << 26


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    numel: int = option(NUMEL, "parameters")
    rounds: int = option(15, "samples of each contender")
    dtype: str = option(
        "float32", "of the parameters", choices=("float16", "bfloat16", "float32", "float64")
    )
    threads: tuple[int, ...] = option((1, 2), "threads of each contender, one run for each")
    sources: tuple[int, ...] = option((1,), "gradients summed, one run for each")


CASE = Case(
    name="kernel",
    package=__name__,
    measures="the CPU kernel against bare loops over memory and torch's NAdam, on as many threads",
    start="python -m benchmarks kernel",
    options=Options,
    claim=Claim(NUMEL, settings={"sources": 1}),
    ratios=(
        quotient(
            KERNEL_RATE,
            TRIAD_RATE,
            Target(at_least=0.9),
            name="kernel GB/s / triad GB/s",
            follows=(TRIAD, KERNEL),
        ),
        quotient(
            KERNEL_RATE,
            AXPY_RATE,
            name="kernel GB/s / axpy GB/s",
            follows=(AXPY, KERNEL),
            better="more",
        ),
        quotient(FOREACH, KERNEL, Target(at_least=5.0)),
    ),
    quick=Quick(("--numel", "1048576", "--rounds", "5", "--threads", "1")),
)
