"""Time a step through each framework; see ``benchmarks.cases.faces``."""

from collections.abc import Iterator

from mpi4py import MPI

from benchmarks.cases.faces import CASE, Options
from benchmarks.contenders.faces import installed_faces
from benchmarks.contenders.internals import share_of_cores
from benchmarks.contenders.names import THROUGH_TORCH_BFLOAT16
from benchmarks.contenders.problem import Problem, require_alike
from benchmarks.contenders.torch_env import load_torch
from benchmarks.harness.result import Result
from benchmarks.harness.timing import sample


def measure(options: Options) -> Iterator[Result]:
    """Time all frameworks in turn."""
    comm = MPI.COMM_WORLD
    threads = share_of_cores(comm)
    load_torch(threads)
    problem = Problem(comm, options.numel, options.tensors, threads)
    contenders = {name: make(problem) for name, make in installed_faces().items()}
    runs = {name: contender.step for name, contender in contenders.items()}
    samples_s, others = sample(runs, options.rounds, comm=comm)
    exact = [name for name in contenders if name != THROUGH_TORCH_BFLOAT16]
    require_alike({name: contenders[name] for name in exact}, options.tensors)
    for contender in contenders.values():
        contender.close()
    if comm.rank == 0:
        yield problem.result(
            CASE.name,
            f"step() by framework: {options.tensors} tensors, time of the slowest rank",
            samples_s,
            others=others,
        )
