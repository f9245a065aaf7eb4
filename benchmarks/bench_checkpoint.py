"""Time checkpoints, saved beside training and loaded, against the disk, memcpy and torch's.

mpirun -n 2 python benchmarks/bench_checkpoint.py --folder /on/a/disk
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mpi4py import MPI

from meter import cpu_s, growth_nbytes
from names import (
    BARE_READ,
    BESIDE,
    CHECKPOINT_NBYTES,
    COMPUTE,
    CPU,
    DCP,
    DCP_KEPT,
    DIRECT_WRITE,
    DURABLE,
    GROWTH,
    LOAD,
    LOAD_OVER,
    MEMCPY,
    SHARDOPT,
    STALL,
    STEP,
    TORCH_SAVE,
    WRITTEN,
)
from peers import DTYPE, gloo, load_torch, share_of_cores
from record import Neighbours, Result, Samples, report, slowest_s
from savers import (
    Background,
    Saver,
    ShardoptSaver,
    digest,
    make_savers,
    read_bare,
    require_equal,
)
from scratch import DirectWriter, scratch_folder, write_directly
from shardopt.checkpoint.format.image import aligned_empty
from shardopt.numpy import NAdam
from training import make_compute, make_optimizer, some_numbers
from verdict import checkpoint_ratios

BYTES_PER_PARAMETER = 12
STEPS_ALONE = 5
ASYNCHRONOUS = (SHARDOPT, DCP, DCP_KEPT)
LOADERS = (SHARDOPT, DCP, TORCH_SAVE)


@dataclass
class Run:
    """One run of the benchmark, and what it has found.

    Attributes:
        comm: The ranks.
        folder: Where files go.
        nbytes: Of a rank's checkpoint.
        rounds: Samples of each contender; one round more is a warm-up, in which memory is measured.
        threads: Cores of each rank.
        has_torch: Whether its contenders take part.
        samples_s: Seconds, by what was measured of whom; of the slowest rank.
        figures: Megabytes; of the rank that takes most.
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
        """Numbers of the rounds; that of the warm-up is negative."""
        return range(-1, self.rounds)

    def add(self, number: int, name: str, value_s: float) -> None:
        """Take down a sample of a round, unless that is the warm-up."""
        if number >= 0:
            self.samples_s.setdefault(name, []).append(value_s)

    def time(self, number: int, name: str, function: Callable[[], object]) -> None:
        """Take the time that the slowest rank needs. Collective: every rank."""
        self.add(number, name, slowest_s(function, self.comm))

    def measure(self, number: int, who: str, what: str, function: Callable[[], object]) -> None:
        """Call ``function``; in the warm-up take the memory that it needs. Collective."""
        if number >= 0:
            function()
            return
        grown = self.comm.allreduce(growth_nbytes(function), MPI.MAX)
        self.figures[GROWTH.format(who, what)] = grown / 1e6


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nbytes-per-rank", type=nbytes_of, default=CHECKPOINT_NBYTES,
                        help="of its checkpoint, for example 256MiB (1GiB)")  # fmt: skip
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (the system's tmp)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each contender (7)")
    arguments = parser.parse_args()
    comm = MPI.COMM_WORLD
    threads = share_of_cores(comm)
    has_torch = load_torch(threads) is not None
    with gloo(comm, has_torch), scratch_folder(comm, arguments.folder) as folder:
        run = Run(comm, folder, arguments.nbytes_per_rank, arguments.rounds, threads, has_torch)
        neighbours = Neighbours(comm)
        measure_all(run)
        others = neighbours.share()
    if comm.rank == 0:
        report(evaluate(run), others)


def measure_all(run: Run) -> None:
    """Save, train and save, load."""
    opt = make_optimizer(run.comm, run.numel, filled=True)
    opt.step()  # lest moments are zero
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


# -- what is measured ------------------------------------------------------------------------------


def measure_saves(run: Run, savers: Mapping[str, Saver]) -> None:
    """Save by every contender, copy in memory and write to the disk as much, in turn."""
    source, target = aligned_empty(run.nbytes), aligned_empty(run.nbytes)
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
    for what, value_s in zip((STALL, WRITTEN, DURABLE, CPU), seconds, strict=True):
        if what != WRITTEN or name in ASYNCHRONOUS:
            run.add(number, what.format(name), run.comm.allreduce(value_s, MPI.MAX))


def measure_steps(run: Run, opt: NAdam, savers: Mapping[str, Saver]) -> None:
    """Train with nothing beside it, and while each contender that lets us is writing."""
    compute = make_compute()
    content = aligned_empty(run.nbytes)
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
                    run.add(number, BESIDE.format(name, COMPUTE), computed_s)
                    run.add(number, BESIDE.format(name, STEP), stepped_s)
            saver.wait()
            saver.discard()


def in_flight(run: Run, saver: Background) -> bool:
    """Whether all ranks are still writing. Collective: every rank."""
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

    def load(name: str, sample: str, function: Callable[[], object]) -> None:
        run.measure(number, name, "load", lambda: run.time(number, sample, function))
        if number < 0:
            require_equal(run.comm, name, saved, digest(opt))

    def load_by(name: str, saver: Saver) -> None:
        load(name, LOAD.format(name), lambda: saver.load(opt))

    load_by(SHARDOPT, ours)
    load(f"{SHARDOPT}, over a state", LOAD_OVER.format(SHARDOPT), lambda: ours.load(opt))
    load(BARE_READ, BARE_READ, lambda: read_bare(ours.path, opt))
    for name in [name for name in LOADERS[1:] if name in savers]:
        load_by(name, savers[name])


# -- what follows ----------------------------------------------------------------------------------


def evaluate(run: Run) -> Result:
    """Draw the ratios from the samples."""
    ranks, nbytes = run.comm.size, run.nbytes
    return Result(
        benchmark="checkpoint",
        title=f"Checkpoints of {nbytes / 2**20:.0f} MiB a rank; times of the slowest rank",
        ranks=ranks,
        threads=run.threads,
        dtype=DTYPE,
        numel=run.numel,
        samples_s=run.samples_s,
        ratios=checkpoint_ratios(run.samples_s, run.figures, nbytes),
        claimed=nbytes == CHECKPOINT_NBYTES,
        figures=run.figures,
        settings={"nbytes_per_rank": nbytes},
    )


def nbytes_of(text: str) -> int:
    """Read a size, for example ``1GiB``."""
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    for unit, factor in units.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor) // 4096 * 4096
    return int(text) // 4096 * 4096


if __name__ == "__main__":
    main()
