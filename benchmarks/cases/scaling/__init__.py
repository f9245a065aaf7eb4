"""A step on more and more ranks of one job: strong and weak scaling, beside its peers.

Strong scaling has one model for every number of ranks, weak scaling as many parameters for each
rank. Ranks that are not at work sleep. ``--only counts`` counts bytes and messages and measures
memory instead of time, so that many more ranks than cores will do.
"""

from dataclasses import dataclass

from benchmarks.contenders.names import (
    BEHIND_BACKWARD,
    DDP,
    DEEPSPEED,
    FSDP2,
    OPTAX,
    REDUCE_SCATTER,
    REPLICATED,
    SHARDOPT,
    SHARDOPT_OPTAX,
    ZERO_REDUNDANCY,
)
from benchmarks.harness.case import Case, Claim, Quick, Ratio, Target, quotient
from benchmarks.harness.options import option
from benchmarks.harness.result import Result

STRONG, WEAK, COUNTS = "strong", "weak", "counts"
PEERS = (
    REDUCE_SCATTER,
    ZERO_REDUNDANCY,
    REPLICATED,
    BEHIND_BACKWARD,
    DDP,
    FSDP2,
    SHARDOPT_OPTAX,
    OPTAX,
    DEEPSPEED,
)
OURS_FOR = {
    REDUCE_SCATTER: SHARDOPT,
    ZERO_REDUNDANCY: SHARDOPT,
    REPLICATED: SHARDOPT,
    DDP: BEHIND_BACKWARD,
    FSDP2: BEHIND_BACKWARD,
    OPTAX: SHARDOPT_OPTAX,
}
"""The contender that each peer is compared with; DeepSpeed's Adam has no counterpart."""

ALL_AXPYS = "axpy on all ranks at once"
LINKS = "its bytes between nodes, by MPI"
LIMIT = "limit of memory and links, s"
MEMORY_RATE = "memory of a node, GB/s"
LINK_RATE = "sent by a node, Gbit/s"
DISK_RATE = "disk of the first node, GB/s"

SENT_MB = "MB sent by a node in a step"
PLANNED_MB = "MB planned"
MESSAGES = "messages sent by a rank in a step, at most"
PLANNED_MESSAGES = "messages planned"
REPORTED = "memory_report() of a node, bytes/parameter"
MEASURED = "memory of a node, bytes/parameter"

NUMEL = 1 << 23
NUMEL_PER_RANK = 1 << 21
COUNTS_NUMEL = 1 << 20


def _from_report(result: Result) -> float:
    return abs(result.value(MEASURED) / result.value(REPORTED) - 1)


def _over_least(result: Result) -> float | None:
    nodes = int(result.settings["nodes"])
    least = 2 * 4 * result.numel * (nodes - 1) / nodes / 1e6
    return result.value(SENT_MB) / least if least else None


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    only: str | None = option(
        None, "measure only this (else strong and weak)", choices=(STRONG, WEAK, COUNTS)
    )
    numel: int | None = option(None, "parameters, strong (8 Mi) and counts (1 Mi)", kind=int)
    numel_per_rank: int = option(NUMEL_PER_RANK, "parameters for each rank, weak")
    tensors: int = option(16, "arrays they come in")
    rounds: int = option(5, "samples of each contender")
    ranks: tuple[int, ...] = option((), "numbers of ranks at work; else 1 2 4 ... all", kind=int)
    ranks_per_node: int | None = option(
        None, "that share memory; else all of a machine's", kind=int
    )
    folder: str | None = option(
        None, "on the disk to be measured; else the system's for such files"
    )
    skip: tuple[str, ...] = option((), "contenders left out", choices=PEERS)


CASE = Case(
    name="scaling",
    package=__name__,
    measures="a step on more and more ranks of one job: strong and weak scaling, beside its peers",
    start="mpirun -n 4 python -m benchmarks scaling",
    options=Options,
    claim=Claim(COUNTS_NUMEL),
    page="benchmarks.report.scaling",
    ratios=(
        quotient(SHARDOPT, LIMIT, name=f"{SHARDOPT} / its limit"),
        *(quotient(name, ours) for name, ours in OURS_FOR.items()),
        quotient(SENT_MB, PLANNED_MB, Target(at_most=1.0), name="sent by a node / as planned"),
        Ratio("sent by a node / the least", (SENT_MB,), _over_least, Target(at_most=1.05)),
        quotient(MESSAGES, PLANNED_MESSAGES, Target(at_most=1.0)),
        Ratio(
            "memory of a node: from memory_report(), relative",
            (MEASURED, REPORTED),
            _from_report,
        ),
    ),
    quick=Quick(("--numel", "262144", "--numel-per-rank", "131072", "--rounds", "3"), ranks=2),
)
