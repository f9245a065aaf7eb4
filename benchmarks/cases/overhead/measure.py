"""Time the overhead of a step; see ``benchmarks.cases.overhead``."""

from collections.abc import Callable, Iterator

from mpi4py import MPI

from benchmarks.cases.overhead import CASE, Options
from benchmarks.contenders.faces import ShardoptTorch
from benchmarks.contenders.names import FOREACH, SHARDOPT, THROUGH_TORCH
from benchmarks.contenders.ours import Shardopt
from benchmarks.contenders.peers import torch_params
from benchmarks.contenders.problem import DTYPE, Contender, Problem
from benchmarks.contenders.torch_env import load_torch
from benchmarks.harness.result import Result
from benchmarks.harness.timing import require_one_rank, sample

STEPS = 200


def measure(options: Options) -> Iterator[Result]:
    """Time many steps at a time, as one alone is too short."""
    require_one_rank(CASE.name)
    problem = Problem(MPI.COMM_SELF, options.numel, options.tensors, 1)
    contenders: dict[str, Contender] = {SHARDOPT: Shardopt(problem)}
    steps: dict[str, Callable[[], object]] = {SHARDOPT: contenders[SHARDOPT].step}
    torch = load_torch(1)
    if torch is not None:
        params = torch_params(torch, problem)
        contenders[THROUGH_TORCH] = ShardoptTorch(problem)
        steps[FOREACH] = torch.optim.NAdam(params, foreach=True).step
        steps[THROUGH_TORCH] = contenders[THROUGH_TORCH].step
    runs = {name: repeat(step) for name, step in steps.items()}
    runs_s, others = sample(runs, options.rounds)
    for contender in contenders.values():
        contender.close()
    yield Result(
        case=CASE.name,
        title=f"step() of {options.tensors} tensors: overhead (mean of {STEPS} steps)",
        ranks=1,
        threads=1,
        dtype=DTYPE,
        numel=options.numel,
        samples_s={name: [value / STEPS for value in values] for name, values in runs_s.items()},
        others=others,
    )


def repeat(step: Callable[[], object]) -> Callable[[], None]:
    """Make one sample of many steps."""

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return steps
