"""A single process that trains on the global batch: what every contender of a step must arrive at.

[Note: steps of a constant gradient]
Gradients are the same in every step, so the moments have a closed form: after t steps ``exp_avg``
is ``(1 - beta1^t) g`` and the corrected ``exp_avg_sq`` is ``g^2``, where ``g`` is the mean over all
ranks. Every rule below then moves a parameter by ``-size_t * g / (|g| + eps)``, and only ``size_t``
differs. Gradients are about as large as ``eps``, or their scale would not matter and nobody would
notice a sum that is taken for a mean.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod, sqrt
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from benchmarks.contenders.problem import DTYPE, LR, Contender, Problem
from benchmarks.harness.placing import FloatArray
from benchmarks.harness.timing import meet_asleep

LARGEST_DIFFERENCE = 1e-5  # of any parameter; a step moves most of them by LR
_BETA1: float = 0.9
_EPS, _MOMENTUM_DECAY = 1e-8, 4e-3
_GRAD_SIZE = 3 * _EPS  # of the mean
_OWNER_NUMEL = 1 << 22  # gradients that one rank draws for a tensor, over all ranks

Rule = Callable[[int], float]
"""Returns the size of a step, counted from 1."""


class Judged(NamedTuple):
    """A contender, and the rule that it must follow."""

    contender: Contender
    rule: Rule


def grad_size(num_ranks: int) -> float:
    """Return the standard deviation of each rank's gradients; see the note above."""
    return _GRAD_SIZE * sqrt(num_ranks)


def torch_nadam(step: int) -> float:
    """Return the size of a step of ``torch.optim.NAdam``, as its documentation has the formula."""
    mus: list[float] = [
        _BETA1 * (1 - 0.5 * 0.96 ** (t * _MOMENTUM_DECAY)) for t in range(1, step + 2)
    ]
    grad = (1 - mus[-2]) / (1 - prod(mus[:-1]))
    return LR * (grad + mus[-1] / (1 - prod(mus)) * (1 - _BETA1**step))


def optax_nadam(step: int) -> float:
    """Return the size of a step of ``optax.nadam``: T. Dozat, 2016, without a momentum schedule."""
    grad = (1 - _BETA1) / (1 - _BETA1**step)
    return LR * (grad + _BETA1 / (1 - _BETA1 ** (step + 1)) * (1 - _BETA1**step))


def adam(step: int) -> float:
    """Return the size of a step of Adam: D. P. Kingma and J. Ba, 2014."""
    return LR


def expected(problem: Problem, tensor: int, numel: int, size: float) -> FloatArray:
    """Return the beginning of a tensor after some steps: [numel] of float32.

    Args:
        problem: The model.
        tensor: The tensor.
        numel: Elements to compute.
        size: The sizes of all steps together.
    """
    mean = np.zeros(numel)
    grad, param = np.empty(numel, DTYPE), np.empty(numel, DTYPE)
    for rank in range(problem.comm.size):
        problem.fill_grad(grad, tensor, rank)
        mean += grad
    mean /= problem.comm.size
    problem.fill_param(param, tensor)
    moved: FloatArray = (param - size * mean / (np.abs(mean) + _EPS)).astype(DTYPE)
    return moved


def require_right(
    contenders: Mapping[str, Judged],
    problem: Problem,
    steps: int,
    owner_numel: int = _OWNER_NUMEL,
) -> None:
    """Make sure that contenders hold the parameters which the oracle arrives at.

    Ranks share out the tensors, and each compares its own copies with what all of them found. In
    jobs of many ranks only the beginning of each tensor is compared.

    Collective: every rank of the problem.

    Args:
        contenders: By name.
        problem: Their model.
        steps: How many they have taken.
        owner_numel: Gradients to be drawn for a tensor at most, those of all ranks together.

    Raises:
        RuntimeError: One of them holds other parameters, on some rank.
    """
    comm, worst = problem.comm, dict.fromkeys(contenders, 0.0)
    numels = [min(b - a, owner_numel // comm.size + 1) for a, b in problem.bounds()]
    for rule in sorted({judged.rule for judged in contenders.values()}, key=lambda r: r.__name__):
        right = _all_expected(problem, numels, sum(map(rule, range(1, steps + 1))))
        for name, judged in contenders.items():
            for tensor, array in enumerate(right if judged.rule is rule else ()):
                found = judged.contender.tensor(tensor).reshape(-1)[: array.size]
                difference = np.nan_to_num(np.abs(found - array), nan=np.inf)
                worst[name] = max(worst[name], float(difference.max(initial=0)))
    for name, mine_worst in worst.items():
        largest: float = comm.allreduce(mine_worst, MPI.MAX)
        if largest > LARGEST_DIFFERENCE:
            raise RuntimeError(
                f"{name} must train as one process does on the batches of all {comm.size} ranks; "
                f"got a parameter that differs by {largest:.2g} after {steps} steps. Fix the "
                "contender."
            )


def _all_expected(problem: Problem, numels: Sequence[int], size: float) -> list[FloatArray]:
    """Return the beginnings of all tensors: [numels[i]] of float32. Collective.

    Args:
        problem: The model.
        numels: Elements of each tensor.
        size: As in ``expected``.
    """
    comm, cuts = problem.comm, np.cumsum([0, *numels])
    whole = np.zeros(cuts[-1], DTYPE)
    tensors = [whole[start:stop] for start, stop in pairwise(cuts)]
    for tensor in range(comm.rank, len(tensors), comm.size):
        tensors[tensor][:] = expected(problem, tensor, numels[tensor], size)
    meet_asleep(comm)  # a few ranks may have all the work
    comm.Allreduce(MPI.IN_PLACE, whole, MPI.SUM)  # exact: all but one are zero
    return tensors
