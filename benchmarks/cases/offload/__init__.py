"""Offloaded updates: copies beside the kernel, against copies around it and the kernel alone."""

from dataclasses import dataclass

from benchmarks.contenders.names import SHARDOPT
from benchmarks.harness.case import Case, Claim, Quick, quotient
from benchmarks.harness.options import option

BESIDE = "offloaded, copies beside the kernel"
AROUND = "offloaded, copies before and after"
KERNEL = "kernel"
COPIES = "copies"
NUMEL = 1 << 25


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    numel: int = option(NUMEL, "parameters")
    tensors: int = option(16, "arrays they come in")
    rounds: int = option(9, "samples of each contender")
    threads: int = option(0, "threads of each rank's updates; 0 takes its share of the cores")
    link: float = option(
        2.0, "GB/s of each rank's link to its device, each way; 0 for as many as memcpy makes"
    )


CASE = Case(
    name="offload",
    package=__name__,
    measures="an offloaded step with copies beside the kernel, and around it, over a paced link",
    start="mpirun -n 2 python -m benchmarks offload",
    options=Options,
    claim=Claim(NUMEL, settings={"link": 2.0}),
    ratios=(
        quotient(BESIDE, AROUND, better="less"),
        quotient(BESIDE, KERNEL, better="less"),
        quotient(AROUND, KERNEL, better="less"),
        quotient(SHARDOPT, KERNEL, better="less"),
        quotient(COPIES, KERNEL),
    ),
    quick=Quick(("--numel", "1048576", "--rounds", "5"), ranks=2),
)
