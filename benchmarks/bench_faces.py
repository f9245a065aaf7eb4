"""Time a whole step through each framework that is installed.

mpirun -n 2 python benchmarks/bench_faces.py
"""

import argparse

from mpi4py import MPI

from faces import installed_faces
from names import (
    REDUCE_SCATTER,
    SHARDOPT,
    STEP_NUMEL,
    THROUGH_TORCH,
    THROUGH_TORCH_BFLOAT16,
    ZERO_REDUNDANCY,
)
from peers import CONTENDERS, DTYPE, Problem, gloo, load_torch, require_alike, share_of_cores
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
    has_torch = load_torch(threads) is not None
    peers = [REDUCE_SCATTER, *([ZERO_REDUNDANCY] if has_torch else [])]
    makers = installed_faces() | {name: CONTENDERS[name] for name in peers}
    problem = Problem(comm, arguments.numel, arguments.tensors, threads)
    with gloo(comm, has_torch):
        contenders = {name: make(problem) for name, make in makers.items()}
        runs = {name: contender.step for name, contender in contenders.items()}
        samples_s, others = sample(runs, arguments.rounds, comm=comm)
        rounded = contenders.pop(THROUGH_TORCH_BFLOAT16, None)
        require_alike(contenders, arguments.tensors)
        for contender in [*contenders.values(), *([] if rounded is None else [rounded])]:
            contender.close()
    if comm.rank == 0:
        report(evaluate(problem, samples_s), others)


def evaluate(problem: Problem, samples_s: Samples) -> Result:
    """Draw the ratios from the samples."""
    times_s = medians(samples_s)
    targets = {(ZERO_REDUNDANCY, THROUGH_TORCH): 8.0, (REDUCE_SCATTER, THROUGH_TORCH): 3.0}
    ratios = [
        Ratio(f"{peer} / {face}", times_s[peer] / times_s[face], target)
        for (peer, face), target in targets.items()
        if peer in times_s and face in times_s
    ]
    ratios += [
        Ratio(f"{face} / {SHARDOPT}", times_s[face] / times_s[SHARDOPT])
        for face in times_s
        if face not in (SHARDOPT, REDUCE_SCATTER, ZERO_REDUNDANCY)
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
