"""Time offloaded steps; see ``benchmarks.cases.offload``."""

import time
from collections.abc import Callable, Iterator

import numpy as np
from mpi4py import MPI

from benchmarks.cases.offload import AROUND, BESIDE, CASE, COPIES, KERNEL, Options
from benchmarks.contenders.internals import BareKernel, make_arrays, share_of_cores
from benchmarks.contenders.names import SHARDOPT
from benchmarks.contenders.offloaded import Offloaded
from benchmarks.contenders.ours import Shardopt
from benchmarks.contenders.problem import DTYPE, Contender, Problem, require_alike
from benchmarks.harness.placing import fill_random
from benchmarks.harness.result import Result
from benchmarks.harness.timing import sample
from shardopt import ShardPolicy


def measure(options: Options) -> Iterator[Result]:
    """Time all contenders in turn."""
    comm = MPI.COMM_WORLD
    threads = options.threads or share_of_cores(comm)
    problem = Problem(comm, options.numel, options.tensors, threads)
    rate = options.link * 1e9 or None
    contenders: dict[str, Contender] = {
        SHARDOPT: Shardopt(problem, ShardPolicy(threads=threads)),
        BESIDE: Offloaded(problem, rate, are_beside=True),
        AROUND: Offloaded(problem, rate, are_beside=False),
    }
    kernel = bare_kernel(problem)
    runs: dict[str, Callable[[], object]] = {KERNEL: kernel.update}
    runs[COPIES] = copies(problem, rate)
    runs |= {name: contender.step for name, contender in contenders.items()}
    samples_s, others = sample(runs, options.rounds, comm=comm)
    require_alike(contenders, options.tensors)
    kernel.close()
    for contender in contenders.values():
        contender.close()
    if comm.rank == 0:
        yield problem.result(
            CASE.name,
            f"offloaded step(), link of {options.link:g} GB/s, time of the slowest rank",
            samples_s,
            settings={"link": options.link},
            others=others,
        )


def bare_kernel(problem: Problem) -> BareKernel:
    """Return the kernel on as many elements and gradients as a rank's shards have."""
    size = problem.comm.size
    arrays = make_arrays(problem.numel // size, DTYPE, size)
    fill_random(arrays.param, 1.0, 0)
    for source, row in enumerate(arrays.grads):
        fill_random(row[: arrays.param.size], 1.0, 1 + source)
    return BareKernel(arrays, size, problem.threads)


def copies(problem: Problem, rate: float | None) -> Callable[[], None]:
    """Return the copies of a rank by themselves: gradients down, then parameters up."""
    source, target = np.ones(problem.numel, DTYPE), np.zeros(problem.numel, DTYPE)
    least_s = 0.0 if rate is None else 2 * source.nbytes / rate

    def copy() -> None:
        stop_s = time.perf_counter() + least_s
        np.copyto(target, source)
        np.copyto(source, target)
        time.sleep(max(0.0, stop_s - time.perf_counter()))

    return copy
