"""Measure the memory of a GPU; see ``benchmarks.cases.gpu_memory``."""

import gc
from collections.abc import Iterator

from mpi4py import MPI

from benchmarks.cases.gpu_memory import CASE, MEASURED, REPORTED, Options
from benchmarks.contenders.gpus import Place, ShardoptOnGpu, opened
from benchmarks.contenders.problem import DTYPE, Problem
from benchmarks.harness.result import Result

STEPS = 3


def measure(options: Options) -> Iterator[Result]:
    """Compare a model with one of a single parameter, so that what CUDA itself takes drops out."""
    comm = MPI.COMM_WORLD
    with opened(options.device) as place:
        least, _ = highest_nbytes(Problem(comm, 1, 1, 1), place)
        highest, reported = highest_nbytes(Problem(comm, options.numel, options.tensors, 1), place)
    if comm.rank == 0:
        yield Result(
            case=CASE.name,
            title=f"Memory of the GPU in {STEPS} steps: growth at its highest, all ranks together",
            ranks=comm.size,
            threads=1,
            dtype=DTYPE,
            numel=options.numel,
            figures={
                MEASURED: (highest - least) / options.numel,
                REPORTED: reported / options.numel,
            },
            settings={"device": options.device},
        )


def highest_nbytes(problem: Problem, place: Place) -> tuple[int, int]:
    """Return the memory in use at its highest, and what the ranks' optimizers report.

    Nothing else may use the GPU meanwhile. Collective: every rank.
    """
    contender = ShardoptOnGpu(problem, place)
    gc.collect()
    place.release()  # what the parameters came from; what steps take stays, and is seen
    problem.comm.Barrier()
    seen = []
    for _ in range(STEPS):
        contender.step()
        contender.optimizer.zero_grad()
        place.wait()
        seen.append(place.used_nbytes())
    report = contender.optimizer.memory_report()
    reported: int = problem.comm.allreduce(report.device_rank_nbytes)
    highest: int = problem.comm.allreduce(max(seen), MPI.MAX)
    contender.close()
    del contender
    gc.collect()
    place.release()
    problem.comm.Barrier()
    return highest, reported
