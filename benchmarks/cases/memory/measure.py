"""Measure the memory of a node; see ``benchmarks.cases.memory``."""

import gc
from collections.abc import Callable, Iterator

from mpi4py import MPI

from benchmarks.cases.memory import CASE, REPORTED, Options, bytes_per_parameter
from benchmarks.contenders.faces import FACES
from benchmarks.contenders.handing import Handing
from benchmarks.contenders.internals import share_of_cores
from benchmarks.contenders.names import NEED_TORCH, STAGE_2, THROUGH_TORCH, THROUGH_TORCH_BFLOAT16
from benchmarks.contenders.peers import CONTENDERS
from benchmarks.contenders.problem import Contender, Problem
from benchmarks.contenders.torch_env import gloo, load_torch
from benchmarks.harness.meter import proportional_set_nbytes, return_freed_memory
from benchmarks.harness.result import Result
from shardopt import ShardPolicy

STEPS = 2


def measure(options: Options) -> Iterator[Result]:
    """Measure one contender after the other."""
    return_freed_memory()  # before the next contender is measured
    comm = MPI.COMM_WORLD
    threads = share_of_cores(comm)
    has_torch = load_torch(threads) is not None
    left_out = {*options.skip, *(() if has_torch else NEED_TORCH)}
    problem = Problem(comm, options.numel, options.tensors, threads)
    with gloo(comm, has_torch):
        makers = {name: make for name, make in CONTENDERS.items() if name not in left_out}
        if has_torch:
            makers |= {name: FACES[name][1] for name in (THROUGH_TORCH, THROUGH_TORCH_BFLOAT16)}
        figures = {
            bytes_per_parameter(name): growth(make, problem) for name, make in makers.items()
        }
        if has_torch:
            figures[bytes_per_parameter(STAGE_2)] = growth(averaging, problem)
            reported = [_reported_nbytes(Problem(comm, n, 1, threads)) for n in (1, options.numel)]
            figures[REPORTED] = (reported[1] - reported[0]) / options.numel
    if comm.rank == 0:
        yield problem.result(
            CASE.name,
            f"Memory of the node after {STEPS} steps: growth of the summed Pss",
            {},
            figures=figures,
        )


def averaging(problem: Problem) -> Handing:
    """Make the optimizer of stage 2."""
    return Handing(problem.comm, problem.numel, ShardPolicy(stage=2))


def _reported_nbytes(problem: Problem) -> int:
    contender = averaging(problem)
    nbytes = contender.shared_nbytes
    contender.close()
    return nbytes


def growth(make: Callable[[Problem], Contender], problem: Problem) -> float:
    """Return the bytes that all ranks together need for each parameter beyond the first."""
    before = stepping_nbytes(make, Problem(problem.comm, 1, 1, problem.threads))
    return (stepping_nbytes(make, problem) - before) / problem.numel


def stepping_nbytes(make: Callable[[Problem], Contender], problem: Problem) -> int:
    """Sum the ranks' proportional set sizes while a contender trains. Collective: every rank."""
    contender = make(problem)
    for _ in range(STEPS):
        contender.step()
    gc.collect()
    problem.comm.Barrier()
    nbytes: int = problem.comm.allreduce(proportional_set_nbytes())
    contender.close()
    del contender
    gc.collect()  # optimizers of torch are in cycles
    return nbytes
