"""Measure what a node needs for a parameter: growth of the ranks' proportional set sizes.

mpirun -n 2 python benchmarks/bench_memory.py
"""

import argparse
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

from mpi4py import MPI

from faces import FACES
from names import (
    BYTES_PER_PARAMETER,
    MEMORY_NUMEL,
    NEED_TORCH,
    SHARDOPT,
    THROUGH_TORCH,
    THROUGH_TORCH_BFLOAT16,
)
from peers import CONTENDERS, DTYPE, PEERS, Contender, Problem, gloo, load_torch, share_of_cores
from record import Ratio, Result, report

STEPS = 2
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=MEMORY_NUMEL, help="parameters (64 Mi)")
    parser.add_argument("--tensors", type=int, default=16, help="arrays they come in (16)")
    parser.add_argument("--skip", nargs="*", default=(), choices=PEERS, help="peers left out")
    arguments = parser.parse_args()
    # What one contender frees must go back to the system before the next is measured.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)
    comm = MPI.COMM_WORLD
    threads = share_of_cores(comm)
    has_torch = load_torch(threads) is not None
    left_out = [*arguments.skip, *(() if has_torch else NEED_TORCH)]
    names = [name for name in CONTENDERS if name not in left_out]
    problem = Problem(comm, arguments.numel, arguments.tensors, threads)
    with gloo(comm, has_torch):
        makers = {name: CONTENDERS[name] for name in names}
        if has_torch:
            makers |= {name: FACES[name][1] for name in (THROUGH_TORCH, THROUGH_TORCH_BFLOAT16)}
        figures = {
            BYTES_PER_PARAMETER.format(name): growth(make, problem) for name, make in makers.items()
        }
    if comm.rank == 0:
        report(evaluate(problem, figures))


def evaluate(problem: Problem, figures: dict[str, float]) -> Result:
    """Draw the ratios from the growth per parameter."""
    ranks = problem.comm.size
    ratios = []
    for name, width, others, text in (
        (SHARDOPT, 4, 8, "8"),  # parameters, every rank's gradients, two moments
        (THROUGH_TORCH, 4, 8, "8"),
        (THROUGH_TORCH_BFLOAT16, 2, 12, "8 + 4"),  # and the masters
    ):
        nbytes = figures.get(BYTES_PER_PARAMETER.format(name))
        if nbytes is not None:
            distance = abs(nbytes / (width * (1 + ranks) + others) - 1)
            title = f"{name}: from {width} + {width} x {ranks} + {text} bytes, relative"
            ratios.append(Ratio(title, distance, 0.02, at_least=False))
    title = f"Memory of the node after {STEPS} steps: growth of the summed Pss"
    return Result(
        "memory",
        title,
        problem.comm.size,
        problem.threads,
        DTYPE,
        problem.numel,
        {},
        ratios,
        problem.numel == MEMORY_NUMEL,
        figures,
    )


def growth(make: Callable[[Problem], Contender], problem: Problem) -> float:
    """Bytes that all ranks together need more for each parameter than with one parameter."""
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


def proportional_set_nbytes() -> int:
    """This process's resident memory, shared pages divided by those who share them."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(
        "/proc/self/smaps_rollup must have a line 'Pss:'; got none. Use Linux >= 4.14."
    )


if __name__ == "__main__":
    main()
