"""Time a whole step; see ``benchmarks.cases.step``."""

from collections.abc import Iterator

from mpi4py import MPI

from benchmarks.cases.step import (
    ALL_AXPYS,
    ALL_TRIADS,
    AXPY_RATE,
    CASE,
    LIMIT,
    STEP_RATE,
    TRIAD_RATE,
    Options,
)
from benchmarks.contenders.faces import ShardoptTorch
from benchmarks.contenders.internals import share_of_cores
from benchmarks.contenders.names import NEED_TORCH, SHARDOPT, THROUGH_TORCH
from benchmarks.contenders.peers import CONTENDERS
from benchmarks.contenders.problem import DTYPE, Contender, Problem, require_alike
from benchmarks.contenders.torch_env import gloo, load_torch
from benchmarks.harness.result import Result, Samples
from benchmarks.harness.timing import sample
from shardopt.measure.memory import Triad


def measure(options: Options) -> Iterator[Result]:
    """Time all contenders in one process group."""
    comm = MPI.COMM_WORLD
    threads = share_of_cores(comm)
    has_torch = load_torch(threads) is not None
    left_out = {*options.skip, *(() if has_torch else NEED_TORCH)}
    problem = Problem(comm, options.numel, options.tensors, threads)
    with gloo(comm, has_torch):
        contenders: dict[str, Contender] = {
            name: make(problem) for name, make in CONTENDERS.items() if name not in left_out
        }
        if has_torch:
            contenders[THROUGH_TORCH] = ShardoptTorch(problem)
        triad = Triad(options.numel, DTYPE, threads)  # of each rank, far beyond the caches
        runs = {name: contender.step for name, contender in contenders.items()}
        runs |= {ALL_TRIADS: triad.triad, ALL_AXPYS: triad.axpy}
        samples_s, others = sample(runs, options.rounds, comm=comm)
        require_alike(contenders, options.tensors)
        for contender in contenders.values():
            contender.close()
        triad.close()
    if comm.rank == 0:
        yield evaluate(problem, samples_s, others, triad.nbytes)


def evaluate(problem: Problem, samples_s: Samples, others: float, triad_nbytes: int) -> Result:
    """Add the rates that follow from the samples.

    Args:
        problem: The model.
        samples_s: As ``sample`` returned them.
        others: Likewise.
        triad_nbytes: Bytes of one rank's triad.
    """
    ranks, numel = problem.comm.size, problem.numel
    result = problem.result(
        CASE.name,
        f"step(): {problem.num_tensors} tensors, time of the slowest rank",
        samples_s,
        others=others,
    )
    step_nbytes = (24 + 4 * ranks) * numel  # moments and params both ways, gradients
    triad_rate, axpy_rate = (
        ranks * triad_nbytes / result.value(name) for name in (ALL_TRIADS, ALL_AXPYS)
    )
    return result.with_figures(
        {
            TRIAD_RATE: triad_rate / 1e9,
            AXPY_RATE: axpy_rate / 1e9,
            STEP_RATE: step_nbytes / result.value(SHARDOPT) / 1e9,
            LIMIT: step_nbytes / axpy_rate / numel * 1e9,
        }
    )
