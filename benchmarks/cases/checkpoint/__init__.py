"""Checkpoints, saved beside training and loaded, against the disk, memcpy and torch's."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.contenders.names import (
    BARE_READ,
    DCP,
    DCP_KEPT,
    DIRECT_WRITE,
    MEMCPY,
    SHARDOPT,
    SYNCHRONOUS,
    TORCH_SAVE,
)
from benchmarks.harness.case import Case, Claim, Quick, Ratio, Target, figure, quotient
from benchmarks.harness.options import nbytes_of, option

NBYTES = 1 << 30
STEP, COMPUTE = "step", "compute"

# Keys of samples, by contender; in ratios, by ``ours / theirs``.


def stall(who: str) -> str:
    """Return the key of the time until training goes on."""
    return f"{who}: stall"


def written(who: str) -> str:
    """Return the key of the time from then until the checkpoint is durable."""
    return f"{who}: durable after the stall"


def durable(who: str) -> str:
    """Return the key of the time from the call until the checkpoint is durable."""
    return f"{who}: durable after the call"


def cpu(who: str) -> str:
    """Return the key of the CPU seconds of a rank that a save takes."""
    return f"{who}: CPU of a rank"


def load(who: str) -> str:
    """Return the key of the time of a load into a new optimizer."""
    return f"{who}: load"


def load_over(who: str) -> str:
    """Return the key of the time of a load over a state that has stepped."""
    return f"{who}: load over a state"


def beside(who: str, work: str) -> str:
    """Return the key of the time of ``work`` while a contender writes."""
    return f"{who}: {work} meanwhile"


def growth(who: str, what: str) -> str:
    """Return the key of the megabytes by which memory grows in a load or a save."""
    return f"{who}: {what} takes beyond, MB"


def _ratios() -> Iterator[Ratio]:
    ours = SHARDOPT
    yield quotient(stall(ours), MEMCPY, Target(at_most=1.3))
    yield quotient(DIRECT_WRITE, written(ours), Target(at_least=0.8))
    yield quotient(DIRECT_WRITE, durable(ours), better="more")
    yield quotient(DIRECT_WRITE, durable(SYNCHRONOUS), better="more")
    of_dcp = {stall: Target(at_most=0.4), cpu: Target(at_most=0.3)}
    for name, targets in ((DCP, of_dcp), (DCP_KEPT, {}), (TORCH_SAVE, {})):
        for what in (stall, cpu, durable, load):
            ratio = what(f"{ours} / {name}")
            yield quotient(what(ours), what(name), targets.get(what), name=ratio, better="less")
    yield quotient(load(ours), BARE_READ, better="less")
    yield quotient(load_over(ours), BARE_READ, better="less")
    for work, target in ((STEP, Target(at_most=1.15)), (COMPUTE, None)):
        yield quotient(beside(ours, work), work, target, better="less")
        yield quotient(beside(ours, work), beside(DIRECT_WRITE, work), better="less")
        for name in (DIRECT_WRITE, DCP, DCP_KEPT):
            yield quotient(beside(name, work), work)
    yield figure(growth(ours, "load"), Target(at_most=256.0))
    yield figure(growth(ours, "save"), Target(at_most=1.05 * NBYTES / 1e6))


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    nbytes_per_rank: int = option(NBYTES, "of its checkpoint, for example 256MiB", kind=nbytes_of)
    folder: str | None = option(None, "on the disk to be measured; else the system's tmp")
    rounds: int = option(7, "samples of each contender")


CASE = Case(
    name="checkpoint",
    package=__name__,
    measures="checkpoints, saved beside training and loaded, against the disk, memcpy and torch's",
    start="mpirun -n 2 python -m benchmarks checkpoint --folder /on/a/disk",
    options=Options,
    claim=Claim(None, settings={"nbytes_per_rank": NBYTES}),
    ratios=tuple(_ratios()),
    quick=Quick(("--nbytes-per-rank", "16MiB", "--rounds", "5"), ranks=2),
)
