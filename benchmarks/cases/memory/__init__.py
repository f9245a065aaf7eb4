"""The memory that a node needs for a parameter: growth of its ranks' proportional set sizes."""

import math
from dataclasses import dataclass

from benchmarks.contenders.names import (
    SHARDOPT,
    STAGE_2,
    STEP_PEERS,
    THROUGH_TORCH,
    THROUGH_TORCH_BFLOAT16,
)
from benchmarks.harness.case import Case, Claim, Quick, Ratio, Target
from benchmarks.harness.options import option
from benchmarks.harness.result import Result

NUMEL = 1 << 26
REPORTED = f"{STAGE_2}: memory_report() without late gradients, bytes/parameter"
_WITHIN = Target(at_most=0.02)


def bytes_per_parameter(contender: str) -> str:
    """Return the key of the bytes that a contender takes for each parameter."""
    return f"{contender}, bytes/parameter"


def _distance(contender: str, width: int, state: tuple[int, ...]) -> Ratio:
    """Make the relative distance of a contender from what it should need for a parameter.

    Args:
        contender: Its name.
        width: Bytes of a parameter, and of each rank's gradient.
        state: Bytes of the moments, and of the master where there is one.
    """
    key = bytes_per_parameter(contender)

    def compute(result: Result) -> float:
        return abs(result.value(key) / (width * (1 + result.ranks) + sum(state)) - 1)

    rest = " + ".join(map(str, state))
    name = f"{contender}: from {width} + {width} x {{ranks}} + {rest} bytes, relative"
    return Ratio(name, (key,), compute, _WITHIN)


def _from_report(result: Result) -> float:
    reported = result.value(REPORTED)  # 0 for a model that fits into one chunk
    measured = result.value(bytes_per_parameter(STAGE_2))
    return abs(measured / reported - 1) if reported else math.inf


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    numel: int = option(NUMEL, "parameters")
    tensors: int = option(16, "arrays they come in")
    skip: tuple[str, ...] = option((), "peers left out", choices=STEP_PEERS)


CASE = Case(
    name="memory",
    package=__name__,
    measures="the memory of a node per parameter: growth of its ranks' proportional set sizes",
    start="mpirun -n 2 python -m benchmarks memory",
    options=Options,
    claim=Claim(NUMEL),
    ratios=(
        _distance(SHARDOPT, 4, (8,)),
        _distance(THROUGH_TORCH, 4, (8,)),
        _distance(THROUGH_TORCH_BFLOAT16, 2, (8, 4)),
        Ratio(
            f"{STAGE_2}: from memory_report(), relative",
            (bytes_per_parameter(STAGE_2), REPORTED),
            _from_report,
            _WITHIN,
        ),
    ),
    quick=Quick(("--numel", "4194304"), ranks=2),
)
