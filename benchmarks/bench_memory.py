"""Measure what a node needs for a parameter: growth of the ranks' proportional set sizes.

mpirun -n 2 python benchmarks/bench_memory.py
"""

import argparse
import ctypes
import gc
from pathlib import Path

from mpi4py import MPI

from names import BYTES_PER_PARAMETER, MEMORY_NUMEL, NEED_TORCH, SHARDOPT
from peers import CONTENDERS, DTYPE, PEERS, Problem, gloo, load_torch, share_of_cores
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
        figures = {BYTES_PER_PARAMETER.format(name): growth(name, problem) for name in names}
    if comm.rank == 0:
        report(evaluate(problem, figures))


def evaluate(problem: Problem, figures: dict[str, float]) -> Result:
    """Draw the ratios from the growth per parameter."""
    needed = 4 + 4 * problem.comm.size + 8  # parameters, every rank's gradients, two moments
    distance = abs(figures[BYTES_PER_PARAMETER.format(SHARDOPT)] / needed - 1)
    text = f"{SHARDOPT}: distance from 4 + 4 x {problem.comm.size} + 8 bytes, relative"
    ratios = [Ratio(text, distance, 0.02, at_least=False)]
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


def growth(name: str, problem: Problem) -> float:
    """Bytes that all ranks together need more for each parameter than with one parameter."""
    before = stepping_nbytes(name, Problem(problem.comm, 1, 1, problem.threads))
    return (stepping_nbytes(name, problem) - before) / problem.numel


def stepping_nbytes(name: str, problem: Problem) -> int:
    """Sum the ranks' proportional set sizes while a contender trains. Collective: every rank."""
    contender = CONTENDERS[name](problem)
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
