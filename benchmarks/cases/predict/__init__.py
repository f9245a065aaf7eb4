"""A step on 1 to 8 hosts of this machine, for the simulation of ``shardopt plan`` to be held to.

It needs root: it makes the hosts (tests/support/cluster.sh) and starts mpirun on them itself, that
of each ``--python``. On each layout ``shardopt doctor --calibrate`` measures the speeds, and then
ranks run the module ``job``. Links are so slow that ranks take less than half of the cores, which
hosts share here; times of steps that take more say less about links than about that. It takes some
30 to 60 seconds for each MPI and layout.
"""

from dataclasses import dataclass

from benchmarks.harness.case import Case, Claim, Ratio, Target
from benchmarks.harness.options import option
from benchmarks.harness.result import Result

STEP = "step"
HALF_RATE = "step, a link at half rate"
LATE = "step, a rank 50 ms late"
UPDATE_ALONE = "update alone, nothing sent"
WIRE = "its bytes over bare TCP"
BUCKETS_KIB = (1024, 256, 64)
LATE_S = 0.05

NUMEL = 1 << 22
ALONE = 8
"""On one node the model is as many times as large, so that caches hold little of it."""

RATE = "200mbit"
LAYOUTS = ("1x2", "2x1", "4x1", "8x1", "2x2")


def with_bucket(kib: int) -> str:
    """Return the key of a step with buckets of a size."""
    return f"{STEP}, buckets of {kib} KiB"


def cpu_s(key: str) -> str:
    """Return the key of the seconds that all ranks together computed, with their waits."""
    return f"{key}: CPU seconds of all ranks"


def calibrated(speed: str) -> str:
    """Return the key of a speed that ``shardopt doctor --calibrate`` measured."""
    return f"calibrated {speed}"


def _largest_error(result: Result) -> float | None:
    """Return how far a step, simulated with the calibrated speeds, is from the measured one."""
    from shardopt.planner.prediction import predict_calibrated, read_steps  # here: loads NumPy

    steps = [step for step in read_steps([result.to_json()]) if not step.is_cpu_bound]
    return max(
        (abs(each.error(each.calibrated_s)) for each in predict_calibrated(steps)), default=None
    )


@dataclass(frozen=True)
class JobOptions:
    """The options of the ranks, which the module ``job`` takes too."""

    rate: str = option(RATE, "bandwidth that each node may send with")
    numel: int = option(NUMEL, "parameters; on one node 8 times as many")
    rounds: int = option(3, "samples of each kind of step")


@dataclass(frozen=True)
class Options(JobOptions):
    """The options of this case."""

    python: tuple[str, ...] = option((), "of environments with an MPI, one run each; else this one")
    layout: tuple[str, ...] = option(LAYOUTS, "nodes x ranks on each of them, one run each")


CASE = Case(
    name="predict",
    package=__name__,
    measures="steps on 1 to 8 hosts of this machine, which shardopt plan must predict",
    start="sudo python -m benchmarks predict",
    options=Options,
    claim=Claim(None, settings={"rate": RATE}),
    ratios=(
        Ratio(
            "error of a step simulated as calibrated, the largest",
            (STEP, calibrated("memory_nbytes_per_s")),
            _largest_error,
            Target(at_most=0.2),
        ),
    ),
    quick="it needs root",
)
