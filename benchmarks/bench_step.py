"""Time a whole step, gradients in place, against its peers and the bandwidth of memory.

mpirun -n 2 python benchmarks/bench_step.py
"""

import argparse

from mpi4py import MPI

from faces import ShardoptTorch
from names import (
    ALL_AXPYS,
    ALL_TRIADS,
    LIMIT,
    NEED_TORCH,
    REDUCE_SCATTER,
    REPLICATED,
    SHARDOPT,
    STEP_NUMEL,
    THROUGH_TORCH,
    ZERO_REDUNDANCY,
)
from peers import (
    CONTENDERS,
    DTYPE,
    PEERS,
    Problem,
    gloo,
    load_torch,
    require_alike,
    share_of_cores,
)
from record import Ratio, Result, Samples, medians, report, sample
from triad import Triad


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=STEP_NUMEL, help="parameters (32 Mi)")
    parser.add_argument("--tensors", type=int, default=16, help="arrays they come in (16)")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each contender (9)")
    parser.add_argument("--skip", nargs="*", default=(), choices=PEERS, help="peers left out")
    arguments = parser.parse_args()
    comm = MPI.COMM_WORLD
    threads = share_of_cores(comm)
    has_torch = load_torch(threads) is not None
    left_out = [*arguments.skip, *(() if has_torch else NEED_TORCH)]
    names = [name for name in CONTENDERS if name not in left_out]
    problem = Problem(comm, arguments.numel, arguments.tensors, threads)
    with gloo(comm, has_torch):
        contenders = {name: CONTENDERS[name](problem) for name in names}
        if has_torch:
            contenders[THROUGH_TORCH] = ShardoptTorch(problem)
        triad = Triad(arguments.numel, DTYPE, threads)  # of each rank, far beyond the caches
        runs = {name: contender.step for name, contender in contenders.items()}
        runs |= {ALL_TRIADS: triad.triad, ALL_AXPYS: triad.axpy}
        samples_s, others = sample(runs, arguments.rounds, comm=comm)
        require_alike(contenders, arguments.tensors)
        for contender in contenders.values():
            contender.close()
    if comm.rank == 0:
        report(evaluate(problem, samples_s, triad.nbytes), others)


def evaluate(problem: Problem, samples_s: Samples, triad_nbytes: int) -> Result:
    """Draw the ratios from the samples.

    Args:
        problem: The model.
        samples_s: As ``sample`` gave them.
        triad_nbytes: Bytes of one rank's triad.
    """
    ranks, times_s = problem.comm.size, medians(samples_s)
    step_nbytes = (24 + 4 * ranks) * problem.numel  # moments and params both ways, gradients
    triad_limit_s, axpy_limit_s = (
        step_nbytes * times_s[name] / (ranks * triad_nbytes) for name in (ALL_TRIADS, ALL_AXPYS)
    )
    ours_s = times_s[SHARDOPT]
    targets = {ZERO_REDUNDANCY: 8.0, REDUCE_SCATTER: 3.0, REPLICATED: None}
    ratios = [
        Ratio(f"{name} / {ours}", times_s[name] / times_s[ours], target)
        for ours in (SHARDOPT, THROUGH_TORCH)
        for name, target in targets.items()
        if name in times_s and ours in times_s
    ]
    ratios += [
        Ratio(f"{SHARDOPT} / its bytes at triad's rate", ours_s / triad_limit_s, 1.15, False),
        Ratio(f"{SHARDOPT} / its bytes at axpy's rate", ours_s / axpy_limit_s, at_least=False),
    ]
    figures = {
        "triad, GB/s": step_nbytes / triad_limit_s / 1e9,
        "axpy, GB/s": step_nbytes / axpy_limit_s / 1e9,
        "step, GB/s": step_nbytes / ours_s / 1e9,
        LIMIT: axpy_limit_s / problem.numel * 1e9,
    }
    title = f"step(): {problem.num_tensors} tensors, time of the slowest rank"
    claimed = ranks > 1 and problem.numel == STEP_NUMEL
    threads, numel = problem.threads, problem.numel
    return Result(
        "step", title, ranks, threads, DTYPE, numel, samples_s, ratios, claimed, figures
    )  # fmt: skip


if __name__ == "__main__":
    main()
