"""The kernel on one GPU, against copies in its memory and torch's NAdam on one GPU."""

from dataclasses import dataclass

from benchmarks.contenders.names import DEVICE_COPY, FOREACH, GRAPH, KERNEL
from benchmarks.harness.case import Case, Claim, Target, quotient
from benchmarks.harness.options import option

NUMEL = 1 << 28
COPY_RATE = f"{DEVICE_COPY}, GB/s"
KERNEL_RATE = f"{KERNEL}, GB/s"


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    numel: int = option(NUMEL, "parameters")
    tensors: int = option(64, "arrays they come in for torch")
    dtypes: tuple[str, ...] = option(("float32", "bfloat16"), "of the parameters")
    device: str = option("cuda", "what to run on", choices=("cuda", "stand-in"))
    rounds: int = option(15, "samples of each contender")


CASE = Case(
    name="gpu_kernel",
    package=__name__,
    measures="the kernel on one GPU, against copies in its memory and torch's NAdam there",
    start="python -m benchmarks gpu_kernel",
    options=Options,
    claim=Claim(NUMEL, dtype=None, settings={"device": "cuda"}),
    ratios=(
        quotient(KERNEL_RATE, COPY_RATE, Target(at_least=0.9), follows=(DEVICE_COPY, KERNEL)),
        quotient(FOREACH, KERNEL, Target(at_least=2.8)),
        quotient(GRAPH, KERNEL, Target(at_least=3.0)),
    ),
    quick="it needs a GPU",
)
