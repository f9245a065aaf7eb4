"""A model to be saved while it is trained: tensors of a transformer's sizes, and its load."""

from collections.abc import Callable, Iterator
from math import prod

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from benchmarks.contenders.problem import DTYPE, GRAD_SIZE
from shardopt.numpy import NAdam, Parameter

VOCABULARY, WIDTH = 50_257, 768
_LAYER = (
    *((WIDTH,), (3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,), (WIDTH,)),
    *((4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH), (WIDTH,)),
)
_LAYER_NUMEL = sum(map(prod, _LAYER))
_CALLS = 500


def make_optimizer(comm: MPI.Intracomm, numel: int, *, filled: bool) -> NAdam:
    """Make a model and its optimizer. Collective: every rank.

    Args:
        comm: The ranks that train it.
        numel: Parameters.
        filled: Whether parameters and gradients hold numbers, or zeros.
    """
    numbers = some_numbers(comm.rank)
    params = []
    for index, shape in enumerate(model_shapes(numel)):
        data = np.zeros(shape, DTYPE)
        if filled:
            data.reshape(-1)[:] = np.resize(numbers, data.size)
        params.append(Parameter(data, f"layer{index // len(_LAYER)}.tensor{index % len(_LAYER)}"))
        del data  # the optimizer's memory holds it from now on
    opt = NAdam(params, comm=comm)
    for param in params if filled else ():
        param.grad.reshape(-1)[:] = np.resize(numbers, param.grad.size)
        param.grad *= GRAD_SIZE
    return opt


def model_shapes(numel: int) -> Iterator[tuple[int, ...]]:
    """Yield tensors from 3 KB to 154 MB: an embedding, as many layers as fit, and the rest."""
    embedding = (min(VOCABULARY, max(1, numel // 3 // WIDTH)), WIDTH)
    yield embedding
    left = numel - prod(embedding)
    while left >= _LAYER_NUMEL:
        yield from _LAYER
        left -= _LAYER_NUMEL
    if left:
        yield (left,)


def some_numbers(seed: int) -> NDArray[np.float32]:
    """Return 4 MiB of numbers that are neither zero nor denormal."""
    return np.random.default_rng(seed).standard_normal(1 << 20, np.float32)


def make_compute() -> Callable[[], None]:
    """Make a stand-in for a model: many small calls, which suffer if a thread holds the GIL."""
    weights = np.full((64, 64), 1 / 64, DTYPE)

    def compute() -> None:
        values = weights
        for _ in range(_CALLS):
            values = np.tanh(values @ weights)

    return compute
