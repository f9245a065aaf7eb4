"""Time the overhead of a step on a GPU; see ``benchmarks.cases.gpu_overhead``."""

from collections.abc import Callable, Iterator

from mpi4py import MPI

from benchmarks.cases.gpu_overhead import CASE, Options
from benchmarks.contenders.faces import ShardoptTorch
from benchmarks.contenders.gpus import ShardoptOnGpu, TorchOnGpu, opened, repeated
from benchmarks.contenders.names import FOREACH, SHARDOPT, THROUGH_TORCH
from benchmarks.contenders.problem import DTYPE, Contender, Problem, require_alike
from benchmarks.contenders.torch_env import load_torch
from benchmarks.harness.result import Result
from benchmarks.harness.timing import require_one_rank, sample

STEPS = 100


def measure(options: Options) -> Iterator[Result]:
    """Time many steps at a time, and the wait for the GPU at their end."""
    require_one_rank(CASE.name)
    problem = Problem(MPI.COMM_SELF, options.numel, options.tensors, 1)
    with opened(options.device) as place:
        contenders: dict[str, Contender] = {SHARDOPT: ShardoptOnGpu(problem, place)}
        steps: dict[str, Callable[[], object]] = {SHARDOPT: contenders[SHARDOPT].step}
        torch = load_torch(1)
        if torch is not None:
            contenders[THROUGH_TORCH] = ShardoptTorch(problem, device=place.torch_name)
            steps[THROUGH_TORCH] = contenders[THROUGH_TORCH].step
            numels = [stop - start for start, stop in problem.bounds()]
            steps[FOREACH] = TorchOnGpu(torch, place, numels).step
        runs = {name: repeated(step, STEPS, place) for name, step in steps.items()}
        runs_s, others = sample(runs, options.rounds)
        require_alike(contenders, options.tensors)
        for contender in contenders.values():
            contender.close()
    yield Result(
        case=CASE.name,
        title=f"step() of {options.tensors} tensors on a GPU: overhead (mean of {STEPS} steps)",
        ranks=1,
        threads=1,
        dtype=DTYPE,
        numel=options.numel,
        samples_s={name: [value / STEPS for value in values] for name, values in runs_s.items()},
        settings={"device": options.device},
        others=others,
    )
