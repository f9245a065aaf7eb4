"""Time steps whose weights are written; see ``benchmarks.cases.writes``."""

from collections.abc import Iterator

from mpi4py import MPI

from benchmarks.cases.writes import CASE, SCAN, Options
from benchmarks.contenders.clamped import ClampedReplica, ClampedShardopt
from benchmarks.contenders.faces import ShardoptTorch
from benchmarks.contenders.internals import scan_of, share_of_cores
from benchmarks.contenders.names import CLAMPED, CLAMPED_REPLICA, THROUGH_TORCH
from benchmarks.contenders.problem import Contender, Problem, require_alike
from benchmarks.contenders.torch_env import load_torch
from benchmarks.harness.result import Result
from benchmarks.harness.timing import sample

WARMUP = 4  # until pages that are written in every step are kept


def measure(options: Options) -> Iterator[Result]:
    """Time all contenders in turn.

    Raises:
        RuntimeError: PyTorch is missing.
    """
    comm = MPI.COMM_WORLD
    threads = share_of_cores(comm)
    if load_torch(threads) is None:
        raise RuntimeError(f"{CASE.name} must have torch; got none. Install it, as README.md says.")
    problem = Problem(comm, options.numel, options.tensors, threads)
    clamped: dict[str, Contender] = {
        CLAMPED: ClampedShardopt(problem),
        CLAMPED_REPLICA: ClampedReplica(problem),
    }
    unwritten = ShardoptTorch(problem)
    runs = {name: contender.step for name, contender in clamped.items()}
    runs |= {THROUGH_TORCH: unwritten.step, SCAN: scan_of(unwritten.optimizer)}
    samples_s, others = sample(runs, options.rounds, comm=comm, warmup=WARMUP)
    require_alike(clamped, options.tensors, CLAMPED)
    for contender in (*clamped.values(), unwritten):
        contender.close()
    if comm.rank == 0:
        yield problem.result(
            CASE.name,
            f"step() and clamp_(): {options.tensors} tensors, time of the slowest rank",
            samples_s,
            others=others,
        )
