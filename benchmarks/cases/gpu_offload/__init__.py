"""A step whose optimizer state is offloaded to CPUs: how far copies and updates overlap."""

from dataclasses import dataclass

from benchmarks.contenders.names import OFFLOADED
from benchmarks.harness.case import Case, Claim, Ratio, quotient
from benchmarks.harness.options import option
from benchmarks.harness.result import Result

NUMEL = 1 << 27
DOWN = "gradients to the host"
UP = "parameters to the GPU"
BOTH = "both copies at once"
UPDATE = "the update on CPUs"
RATES = {name: f"{name}, GB/s" for name in (DOWN, UP, BOTH)}
LONGER = "the longer of both copies and the update"


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    numel: int = option(NUMEL, "parameters")
    tensors: int = option(16, "arrays they come in")
    device: str = option("cuda", "what to run on", choices=("cuda", "stand-in"))
    rounds: int = option(10, "samples of each contender")


def _hidden(result: Result) -> float | None:
    """Return the part of what could be hidden that is."""
    down, up, update, step = map(result.value, (DOWN, UP, UPDATE, OFFLOADED))
    longer = max(result.value(BOTH), update)
    return (down + up + update - step) / (down + up + update - longer)


CASE = Case(
    name="gpu_offload",
    package=__name__,
    measures="a step with offload=cpu: its copies to and from pinned memory beside its updates",
    start="python -m benchmarks gpu_offload",
    options=Options,
    claim=Claim(NUMEL, settings={"device": "cuda"}),
    ratios=(
        quotient(OFFLOADED, LONGER),
        Ratio("copies and update, share hidden", (DOWN, UP, BOTH, UPDATE, OFFLOADED), _hidden),
    ),
    quick="it needs a GPU",
)
