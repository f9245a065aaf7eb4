"""Time ``step()`` of a model too small to matter, on one rank, against torch's NAdam.

python benchmarks/bench_overhead.py
"""

import argparse
from collections.abc import Callable

from mpi4py import MPI

from faces import ShardoptTorch
from names import FOREACH, OVERHEAD_NUMEL, SHARDOPT, THROUGH_TORCH
from peers import DTYPE, Problem, Shardopt, load_torch
from record import Ratio, Result, medians, report, sample

STEPS = 200


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=OVERHEAD_NUMEL, help="parameters (10 000)")
    parser.add_argument("--tensors", type=int, default=20, help="arrays they come in (20)")
    parser.add_argument("--rounds", type=int, default=25, help="samples of each contender (25)")
    arguments = parser.parse_args()
    problem = Problem(MPI.COMM_SELF, arguments.numel, arguments.tensors, 1)
    ours = Shardopt(problem)
    contenders = {SHARDOPT: repeat(ours.step)}
    torch = load_torch(1)
    if torch is not None:
        params = []
        for tensor, (start, stop) in enumerate(problem.bounds()):
            param = torch.empty(stop - start).requires_grad_()
            param.grad = torch.empty(stop - start)
            problem.fill_param(param.detach().numpy(), tensor)
            problem.fill_grad(param.grad.numpy(), tensor)
            params.append(param)
        contenders[FOREACH] = repeat(torch.optim.NAdam(params, foreach=True).step)
        through_torch = ShardoptTorch(problem)
        contenders[THROUGH_TORCH] = repeat(through_torch.step)
    runs_s, others = sample(contenders, arguments.rounds)
    samples_s = {name: [value / STEPS for value in values] for name, values in runs_s.items()}
    ours.close()
    times_s = medians(samples_s)
    ratios = []
    if FOREACH in times_s:
        through_torch.close()
        for name in (SHARDOPT, THROUGH_TORCH):
            ratio = times_s[name] / times_s[FOREACH]
            ratios.append(Ratio(f"{name} / {FOREACH}", ratio, 1.0, at_least=False))
    title = f"step() of {arguments.tensors} tensors: overhead (mean of {STEPS} steps)"
    claimed = arguments.numel == OVERHEAD_NUMEL
    numel = arguments.numel
    report(Result("overhead", title, 1, 1, DTYPE, numel, samples_s, ratios, claimed), others)


def repeat(step: Callable[[], object]) -> Callable[[], None]:
    """Make one sample of many steps."""

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return steps


if __name__ == "__main__":
    main()
