"""A step over several nodes: hosts on this machine, between which links have a limit.

It needs root: it makes the hosts (tests/support/cluster.sh) and starts mpirun on them itself, that
of each ``--python``, for 4 nodes of 1 rank and 2 nodes of 2 ranks. Ranks run the module ``job``. It
takes some 75 seconds for each MPI and layout, and 6 GB of memory.
"""

from dataclasses import dataclass

from benchmarks.contenders.names import REDUCE_SCATTER, SHARDOPT, ZERO_REDUNDANCY
from benchmarks.harness.case import Case, Claim, Ratio, Target, quotient
from benchmarks.harness.options import option
from benchmarks.harness.result import Result

NARROW_WIRE = "shardopt, wire_dtype=bfloat16"
NARROW = "shardopt, bfloat16 parameters and wire"
UPDATE_ALONE = "update alone, nothing sent"
WIRE = "its bytes over bare TCP"
BACKWARD = "backward"
STEP_BEHIND = "step of what backward left"
IN_TURN = "backward, then step: overlap=False"
OVERLAPPED = "backward and step: overlap=True"
PASSES = "forward and backward, as long as the wire, and the update alone"
ARRIVING = "both, step and the wait: prefetch_params=True"
STEPS_BEFORE_WAIT = 4
ARRIVING_OFTEN = f"the same with {STEPS_BEFORE_WAIT} steps before the wait"
AWAITED = "both and step: prefetch_params=False"
PASSED_WIRE = "the wire"
VISIBLE = "visible exchange with prefetch / the wire"
HIDDEN = "exchange of gradients, share behind backward"
SENT_MB = "MB sent by a node in a step"
SENT_ALONE_MB = "MB sent by a node of 1 rank"
BUCKET_MIB = "MiB in a bucket"
HIDDEN_BUCKET_MIB = "MiB in a bucket that leaves while backward runs"

NUMEL = 1 << 24
RATE = "1gbit"
LAYOUTS = ("4x1", "2x2")

_OVER_LIMIT = Target(at_most=1.12, with_mpi={"Open MPI": 1.2})


def least_nbytes(result: Result) -> float:
    """Return the bytes that a node must send in a step: 2 (M-1)/M of the parameters' of M nodes."""
    nodes = int(result.settings["nodes"])
    return 2 * 4 * result.numel * (nodes - 1) / nodes


def _over_limit(limit: str, other: str) -> Ratio:
    """Make the step over one of its limits; the longer one counts."""

    def compute(result: Result) -> float | None:
        if result.value(limit) < result.value(other):
            return None
        return result.value(SHARDOPT) / result.value(limit)

    return Ratio(
        f"{SHARDOPT} / {limit}",
        (SHARDOPT, limit, other),
        compute,
        _OVER_LIMIT,
        follows=(SHARDOPT, limit),
    )


def _sent(result: Result) -> float | None:
    least = least_nbytes(result)
    return result.value(SENT_MB) * 1e6 / least if least else None


def _exchange_s(result: Result) -> float:
    return result.value(STEP_BEHIND) / 2  # gradients are one half of what travels


def _hidden(result: Result) -> float:
    return (result.value(IN_TURN) - result.value(OVERLAPPED)) / _exchange_s(result)


def _visible(result: Result) -> float:
    step_s = (result.value(ARRIVING_OFTEN) - result.value(ARRIVING)) / (STEPS_BEFORE_WAIT - 1)
    return (step_s - result.value(PASSES)) / result.value(PASSED_WIRE)


def _backward(result: Result) -> float:
    return result.value(BACKWARD) / _exchange_s(result)


@dataclass(frozen=True)
class JobOptions:
    """The options of the ranks, which the module ``job`` takes too."""

    rate: str = option(RATE, "bandwidth that each node may send with")
    numel: int = option(NUMEL, "parameters")
    rounds: int = option(5, "samples of each contender")
    bucket_mib: int | None = option(None, "in all buckets; else as the policy has it", kind=int)
    only: str | None = option(
        None, "leave out the other parts", choices=("step", "overlap", "prefetch")
    )


@dataclass(frozen=True)
class Options(JobOptions):
    """The options of this case."""

    python: tuple[str, ...] = option((), "of environments with an MPI, one run each; else this one")
    layout: tuple[str, ...] = option(LAYOUTS, "nodes x ranks on each of them, one run each")


CASE = Case(
    name="nodes",
    package=__name__,
    measures="a step over several nodes, which are hosts on this machine with links of a set rate",
    start="sudo python -m benchmarks nodes",
    options=Options,
    claim=Claim(NUMEL, settings={"rate": RATE}),
    ratios=(
        _over_limit(WIRE, UPDATE_ALONE),
        _over_limit(UPDATE_ALONE, WIRE),
        quotient(NARROW_WIRE, SHARDOPT, Target(at_most=0.8)),
        quotient(NARROW, SHARDOPT, Target(at_most=0.58)),
        quotient(REDUCE_SCATTER, SHARDOPT, Target(at_least=1.0)),
        quotient(ZERO_REDUNDANCY, SHARDOPT, Target(at_least=1.5)),
        Ratio("sent by a node / the least", (SENT_MB,), _sent, Target(at_most=1.05)),
        quotient(
            SENT_MB,
            SENT_ALONE_MB,
            Target(at_most=1.01),
            name="sent by a node / by one of 1 rank",
        ),
        Ratio(HIDDEN, (STEP_BEHIND, IN_TURN, OVERLAPPED), _hidden, Target(at_least=0.7)),
        Ratio(
            VISIBLE,
            (PASSES, ARRIVING, ARRIVING_OFTEN, PASSED_WIRE),
            _visible,
            Target(at_most=0.15),
        ),
        Ratio(f"{BACKWARD} / exchange of gradients", (BACKWARD, STEP_BEHIND), _backward),
    ),
    quick="it needs root",
)
