"""Time checkpoints; see ``benchmarks.cases.checkpoint``."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from mpi4py import MPI

from benchmarks.cases.checkpoint import (
    CASE,
    COMPUTE,
    STEP,
    Options,
    beside,
    cpu,
    durable,
    growth,
    load,
    load_over,
    stall,
    written,
)
from benchmarks.cases.checkpoint.training import make_compute, make_optimizer, some_numbers
from benchmarks.contenders.internals import share_of_cores
from benchmarks.contenders.names import (
    BARE_READ,
    DCP,
    DCP_KEPT,
    DIRECT_WRITE,
    MEMCPY,
    SHARDOPT,
    TORCH_SAVE,
)
from benchmarks.contenders.problem import DTYPE
from benchmarks.contenders.savers import (
    Background,
    Saver,
    ShardoptSaver,
    digest,
    make_savers,
    read_bare,
    require_equal,
)
from benchmarks.contenders.torch_env import gloo, load_torch
from benchmarks.harness.meter import cpu_s, growth_nbytes
from benchmarks.harness.placing import page_aligned
from benchmarks.harness.result import Result, Samples
from benchmarks.harness.scratch import DirectWriter, scratch_folder, write_directly
from benchmarks.harness.timing import Neighbours, slowest_s
from shardopt.numpy import NAdam

BYTES_PER_PARAMETER = 12
STEPS_ALONE = 5
ASYNCHRONOUS = (SHARDOPT, DCP, DCP_KEPT)
LOADERS = (SHARDOPT, DCP, TORCH_SAVE)


@dataclass
class Run:
    """One run of the benchmark, and its findings.

    Attributes:
        comm: The ranks.
        folder: Where files go.
        nbytes: Size of a rank's checkpoint.
        rounds: Samples of each contender; one round more is a warm-up, in which memory is measured.
        threads: Cores of each rank.
        has_torch: Whether torch's contenders take part.
        samples_s: Seconds of the slowest rank, by key.
        figures: Megabytes of the rank that takes most, by key.
    """

    comm: MPI.Intracomm
    folder: Path
    nbytes: int
    rounds: int
    threads: int
    has_torch: bool
    samples_s: Samples = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Parameters of the model."""
        return self.comm.size * self.nbytes // BYTES_PER_PARAMETER

    def numbers(self) -> range:
        """Return the numbers of the rounds; that of the warm-up is negative."""
        return range(-1, self.rounds)

    def add(self, number: int, name: str, value_s: float) -> None:
        """Record a sample of a round, unless that is the warm-up."""
        if number >= 0:
            self.samples_s.setdefault(name, []).append(value_s)

    def time(self, number: int, name: str, function: Callable[[], object]) -> None:
        """Record the time that the slowest rank needs. Collective: every rank."""
        self.add(number, name, slowest_s(function, self.comm))

    def measure(self, number: int, who: str, what: str, function: Callable[[], object]) -> None:
        """Call ``function``; in the warm-up, record the memory that it needs. Collective."""
        if number >= 0:
            function()
            return
        grown = self.comm.allreduce(growth_nbytes(function), MPI.MAX)
        self.figures[growth(who, what)] = grown / 1e6


def measure(options: Options) -> Iterator[Result]:
    """Save, train beside saves and load by every contender."""
    comm = MPI.COMM_WORLD
    threads = share_of_cores(comm)
    has_torch = load_torch(threads) is not None
    with gloo(comm, has_torch), scratch_folder(comm, options.folder) as folder:
        run = Run(comm, folder, options.nbytes_per_rank, options.rounds, threads, has_torch)
        neighbours = Neighbours(comm)
        measure_all(run)
        others = neighbours.share()
    if comm.rank == 0:
        yield Result(
            case=CASE.name,
            title=f"Checkpoints of {run.nbytes / 2**20:.0f} MiB a rank; times of the slowest rank",
            ranks=comm.size,
            threads=threads,
            dtype=DTYPE,
            numel=run.numel,
            samples_s=run.samples_s,
            figures=run.figures,
            settings={"nbytes_per_rank": run.nbytes},
            others=others,
        )


def measure_all(run: Run) -> None:
    """Save, train and save, load."""
    opt = make_optimizer(run.comm, run.numel, filled=True)
    opt.step()  # so that moments are not zero
    savers = make_savers(run.folder, opt, run.has_torch)
    measure_saves(run, savers)
    measure_steps(run, opt, savers)
    saved = digest(opt)
    for name, saver in savers.items():
        if name in LOADERS:  # from the page cache as far as it can be there
            saver.begin(2 * run.rounds + 2)
            saver.wait()
        saver.close()
    opt.close()
    del opt
    measure_loads(run, savers, saved)


# -- measurements ------------------------------------------------------------------------------


def measure_saves(run: Run, savers: Mapping[str, Saver]) -> None:
    """Save by every contender, and copy in memory and write to the disk as many bytes, in turn."""
    source, target = page_aligned(run.nbytes, "uint8"), page_aligned(run.nbytes, "uint8")
    source[:] = np.resize(some_numbers(run.comm.rank).view(np.uint8), run.nbytes)
    target[:] = 0
    path = run.folder / f"direct-{run.comm.rank}"

    def save(name: str, saver: Saver, number: int) -> None:
        run.measure(number, name, "save", lambda: time_save(run, number, name, saver))
        saver.discard()

    for number in run.numbers():
        run.time(number, MEMCPY, lambda: np.copyto(target, source))
        run.time(number, DIRECT_WRITE, lambda: write_directly(path, source))
        path.unlink()
        for name, saver in savers.items():
            save(name, saver, number)


def time_save(run: Run, number: int, name: str, saver: Saver) -> None:
    """Save once. Collective: every rank."""
    seconds = list[float]()

    def save() -> None:
        begin_s = time.perf_counter()
        saver.begin(1 + number)
        stalled_s = time.perf_counter()
        saver.wait()
        end_s = time.perf_counter()
        seconds.extend((stalled_s - begin_s, end_s - stalled_s, end_s - begin_s))

    time.sleep(0.01)
    run.comm.Barrier()
    seconds.append(cpu_s(save))
    for key, value_s in zip((stall, written, durable, cpu), seconds, strict=True):
        if key is not written or name in ASYNCHRONOUS:
            run.add(number, key(name), run.comm.allreduce(value_s, MPI.MAX))


def measure_steps(run: Run, opt: NAdam, savers: Mapping[str, Saver]) -> None:
    """Train with nothing beside it, and while each asynchronous contender is writing."""
    compute = make_compute()
    content = page_aligned(run.nbytes, "uint8")
    content[:] = 1
    writers: dict[str, Background] = {
        DIRECT_WRITE: DirectWriter(run.folder / f"direct-{run.comm.rank}", content),
        **{name: saver for name, saver in savers.items() if name in ASYNCHRONOUS},
    }
    for number in run.numbers():
        for name, saver in writers.items():
            for _ in range(STEPS_ALONE):
                run.time(number, COMPUTE, compute)
                run.time(number, STEP, opt.step)
            saver.begin(run.rounds + 1 + number)
            while in_flight(run, saver):
                computed_s, stepped_s = slowest_s(compute, run.comm), slowest_s(opt.step, run.comm)
                if in_flight(run, saver):
                    run.add(number, beside(name, COMPUTE), computed_s)
                    run.add(number, beside(name, STEP), stepped_s)
            saver.wait()
            saver.discard()


def in_flight(run: Run, saver: Background) -> bool:
    """Return whether all ranks are still writing. Collective: every rank."""
    return bool(run.comm.allreduce(saver.in_flight(), MPI.MIN))


def measure_loads(run: Run, savers: Mapping[str, Saver], saved: str) -> None:
    """Load by every contender, from the page cache, into optimizers that were made for it."""
    for number in run.numbers():
        opt = make_optimizer(run.comm, run.numel, filled=False)
        load_by_all(run, number, savers, opt, saved)
        opt.close()


def load_by_all(run: Run, number: int, savers: Mapping[str, Saver], opt: NAdam, saved: str) -> None:
    """Load into an optimizer that has never stepped, and then over what was loaded."""
    ours = savers[SHARDOPT]
    assert isinstance(ours, ShardoptSaver)

    def load_by(name: str, sample: str, function: Callable[[], object]) -> None:
        run.measure(number, name, "load", lambda: run.time(number, sample, function))
        if number < 0:
            require_equal(run.comm, name, saved, digest(opt))

    load_by(SHARDOPT, load(SHARDOPT), lambda: ours.load(opt))
    load_by(f"{SHARDOPT}, over a state", load_over(SHARDOPT), lambda: ours.load(opt))
    load_by(BARE_READ, BARE_READ, lambda: read_bare(ours.path, opt))
    for name in LOADERS[1:]:
        if name in savers:
            load_by(name, load(name), partial(savers[name].load, opt))
