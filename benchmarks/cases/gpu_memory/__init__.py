"""The memory of a GPU while a model trains on it, against what the optimizer reports."""

from dataclasses import dataclass

from benchmarks.harness.case import Case, Claim, Ratio, Target
from benchmarks.harness.options import option
from benchmarks.harness.result import Result

NUMEL = 1 << 28
MEASURED = "measured at its highest, bytes/parameter"
REPORTED = "memory_report(), bytes/parameter"


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    numel: int = option(NUMEL, "parameters")
    tensors: int = option(16, "arrays they come in")
    device: str = option("cuda", "what to run on", choices=("cuda", "stand-in"))


def _distance(result: Result) -> float | None:
    reported = result.value(REPORTED)
    return abs(result.value(MEASURED) / reported - 1) if reported else None


CASE = Case(
    name="gpu_memory",
    package=__name__,
    measures="the memory of a GPU that ranks train on, against opt.memory_report()",
    start="python -m benchmarks gpu_memory",
    options=Options,
    claim=Claim(NUMEL, settings={"device": "cuda"}),
    ratios=(
        Ratio(
            "memory of the GPU: from memory_report(), relative",
            (MEASURED, REPORTED),
            _distance,
            Target(at_most=0.02),
        ),
    ),
    quick="it needs a GPU",
)
