"""Time a whole step through each framework that is installed.

mpirun -n 2 python benchmarks/bench_faces.py
"""

import argparse

from mpi4py import MPI

from faces import installed_faces
from names import SHARDOPT, STEP_NUMEL, THROUGH_TORCH_BFLOAT16
from peers import DTYPE, Problem, load_torch, require_alike, share_of_cores
from record import Ratio, Result, Samples, medians, report, sample


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=STEP_NUMEL, help="parameters (32 Mi)")
    parser.add_argument("--tensors", type=int, default=16, help="arrays they come in (16)")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each contender (9)")
    arguments = parser.parse_args()
    comm = MPI.COMM_WORLD
    threads = share_of_cores(comm)
    load_torch(threads)
    problem = Problem(comm, arguments.numel, arguments.tensors, threads)
    contenders = {name: make(problem) for name, make in installed_faces().items()}
    runs = {name: contender.step for name, contender in contenders.items()}
    samples_s, others = sample(runs, arguments.rounds, comm=comm)
    exact = [name for name in contenders if name != THROUGH_TORCH_BFLOAT16]
    require_alike({name: contenders[name] for name in exact}, arguments.tensors)
    for contender in contenders.values():
        contender.close()
    if comm.rank == 0:
        report(evaluate(problem, samples_s), others)


def evaluate(problem: Problem, samples_s: Samples) -> Result:
    """Draw the ratios from the samples."""
    times_s = medians(samples_s)
    ratios = [
        Ratio(f"{face} / {SHARDOPT}", time_s / times_s[SHARDOPT])
        for face, time_s in times_s.items()
        if face != SHARDOPT
    ]
    title = f"step() by framework: {problem.num_tensors} tensors, time of the slowest rank"
    return Result(
        "faces",
        title,
        problem.comm.size,
        problem.threads,
        DTYPE,
        problem.numel,
        samples_s,
        ratios,
        problem.comm.size > 1 and problem.numel == STEP_NUMEL,
    )


if __name__ == "__main__":
    main()
