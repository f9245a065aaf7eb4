"""What every benchmark shares: interleaved timing, and a table and a JSON line for the result."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from mpi4py import MPI

from names import FOLDER, QUIET, RESULTS_FOLDER

_PAUSE_S = 0.01
"""Between two contenders, so that threads which spin for more work have gone to sleep."""

_WIDTH = 58

Samples = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure that a claim is about.

    Attributes:
        name: What is divided by what.
        value: As measured.
        target: What it should be, or None for a figure that is only reported.
        at_least: Whether more is better.
    """

    name: str
    value: float
    target: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one benchmark.

    Attributes:
        benchmark: Name of the file under ``results/``.
        title: Heading of the table.
        ranks: MPI ranks.
        threads: Threads of each rank.
        dtype: Of the parameters.
        numel: Parameters in the model.
        samples_s: Seconds of each round, by contender; on several ranks the slowest one's.
        ratios: What follows from them.
        claimed: Whether this is the setting that the targets are for; others just report.
        figures: Other measured numbers, by name.
        settings: What else tells this run from others of the benchmark.
    """

    benchmark: str
    title: str
    ranks: int
    threads: int
    dtype: str
    numel: int
    samples_s: Samples
    ratios: Sequence[Ratio]
    claimed: bool
    figures: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, int] = field(default_factory=dict)


def sample(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    comm: MPI.Intracomm = MPI.COMM_SELF,
    warmup: int = 2,
    networked: bool = False,
) -> tuple[Samples, float]:
    """Time the contenders in turn, round by round, so that a busy minute falls on all of them.

    Collective: every rank of ``comm``. A sample is the time of the slowest rank.

    Args:
        contenders: What to call, by name.
        rounds: How many times each.
        comm: Ranks that run together.
        warmup: Rounds before those that count.
        networked: As in ``Neighbours``.

    Returns:
        Seconds by contender, and the share of the cores that other jobs took meanwhile.
    """
    samples: Samples = {name: [] for name in contenders}
    neighbours = Neighbours(comm, networked=networked)
    for number in range(-warmup, rounds):
        for name, run in contenders.items():
            spent_s = slowest_s(run, comm)
            if number >= 0:
                samples[name].append(spent_s)
    return samples, neighbours.share()


def slowest_s(run: Callable[[], object], comm: MPI.Intracomm) -> float:
    """Let all ranks begin at once, and give the time of the slowest. Collective."""
    time.sleep(_PAUSE_S)
    comm.Barrier()
    start_s = time.perf_counter()
    run()
    slowest: float = comm.allreduce(time.perf_counter() - start_s, MPI.MAX)
    return slowest


class Neighbours:
    """Other jobs, watched from now on. Collective: construction and every method.

    Args:
        comm: The ranks of this job.
        networked: Leave out interrupts, for it is they that move this job's packets.
    """

    def __init__(self, comm: MPI.Intracomm, *, networked: bool = False) -> None:
        self._comm, self._networked = comm, networked
        self._all_s, self._own_s = _cores_spent_s(networked), time.process_time()
        self._begin_s = time.perf_counter()

    def share(self) -> float:
        """Give the share of the cores that they have taken."""
        own_s = self._comm.allreduce(time.process_time() - self._own_s)
        others_s = max(0.0, _cores_spent_s(self._networked) - self._all_s - own_s)
        share = others_s / (time.perf_counter() - self._begin_s) / (os.cpu_count() or 1)
        highest: float = self._comm.allreduce(share, MPI.MAX)
        return highest


def medians(samples_s: Samples) -> dict[str, float]:
    """Give each contender's median."""
    return {name: median(values) for name, values in samples_s.items()}


def report(result: Result, others: float | None = None) -> None:
    """Print the table and append the JSON line.

    Args:
        result: What was found.
        others: Share of the cores that other jobs took meanwhile, where time was measured.
    """
    if not result.claimed:
        result = replace(result, ratios=[replace(ratio, target=None) for ratio in result.ratios])
    _print_table(result)
    if others is not None:
        advice = ": repeat it on a quiet machine" if others > QUIET else ""
        print(f"  other jobs took {others:.0%} of the cores meanwhile{advice}", flush=True)
    line = {
        "benchmark": result.benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "others": None if others is None else round(others, 3),
        "mpi": mpi_library(),
        "versions": _versions(),
        "ranks": result.ranks,
        "threads": result.threads,
        "dtype": result.dtype,
        "numel": result.numel,
        "samples_s": {
            name: [round(value, 9) for value in values] for name, values in result.samples_s.items()
        },
        "ratios": [asdict(ratio) | {"met": ratio.met} for ratio in result.ratios],
        "figures": dict(result.figures),
        "settings": dict(result.settings),
    }
    RESULTS_FOLDER.mkdir(exist_ok=True)
    with (RESULTS_FOLDER / f"{result.benchmark}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def machine() -> dict[str, Any]:
    """Describe the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
    }


def commit() -> str:
    """Name the commit measured, with ``+`` where tracked files differ from it."""
    head = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "../shardopt")
    return f"{head}+" if head and changed else head or "none"


def mpi_library() -> str:
    """Name the MPI in use, for example ``MPICH 5.0.2``."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def _cores_spent_s(networked: bool) -> float:
    """Time that all cores together have spent on something, since the machine started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    interrupts = 0 if networked else irq + softirq
    return (user + nice + system + interrupts) / os.sysconf("SC_CLK_TCK")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=FOLDER, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("numpy", "numba", "mpi4py", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _print_table(result: Result) -> None:
    dtype, plural = result.dtype, "s" if result.ranks > 1 else ""
    print(
        f"\n{result.title}\n{result.numel:,} {dtype} parameters, {result.ranks} rank{plural} "
        f"x {result.threads} thread(s), {mpi_library()}, {machine()['cpu']}"
    )
    for name, values in result.samples_s.items():
        middle, each = median(values), median(values) / result.numel * 1e9
        spread = f"{_duration(min(values))} to {_duration(max(values))}"
        print(f"  {name:<{_WIDTH}} {_duration(middle):>10}  {each:9.3f} ns/parameter  ({spread})")
    for name, value in result.figures.items():
        print(f"  {name:<{_WIDTH}} {value:10.3f}")
    for ratio in result.ratios:
        verdict = ""
        if ratio.target is not None:
            sign = ">=" if ratio.at_least else "<="
            verdict = f"target {sign} {ratio.target:<5g} {'met' if ratio.met else 'MISSED'}"
        print(f"  {ratio.name:<{_WIDTH}} {ratio.value:10.3f}  {verdict}".rstrip(), flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
