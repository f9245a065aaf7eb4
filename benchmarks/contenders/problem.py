"""The model that every contender of a step trains, and what a contender must be able to do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from benchmarks.contenders.names import SHARDOPT
from benchmarks.harness.placing import FloatArray
from benchmarks.harness.result import Result, Samples

DTYPE = "float32"
LR = 2e-3  # torch's default for NAdam
GRAD_SIZE = 0.01
LARGEST_MEAN_DIFFERENCE = 1e-5


@dataclass(frozen=True)
class Problem:
    """A model and its gradients, the same for every contender.

    Attributes:
        comm: The ranks that train it.
        numel: Parameters.
        num_tensors: Arrays they come in, of equal size but for the last.
        threads: Cores for each rank.
        grad_size: Standard deviation of a rank's gradients.
        group: The process group of torch with the same ranks; None if that is the default one.
    """

    comm: MPI.Intracomm
    numel: int
    num_tensors: int
    threads: int
    grad_size: float = GRAD_SIZE
    group: Any = None

    def result(self, case: str, title: str, samples_s: Samples, **more: Any) -> Result:
        """Return the result of a case that has trained it.

        Args:
            case: Its name.
            title: See ``Result``.
            samples_s: Likewise.
            **more: Other fields of ``Result``.
        """
        return Result(
            case=case,
            title=title,
            ranks=self.comm.size,
            threads=self.threads,
            dtype=DTYPE,
            numel=self.numel,
            samples_s=samples_s,
            **more,
        )

    def bounds(self) -> list[tuple[int, int]]:
        """Return where each tensor begins and ends in the flattened model."""
        cuts = [self.numel * i // self.num_tensors for i in range(self.num_tensors + 1)]
        return [(cuts[i], cuts[i + 1]) for i in range(self.num_tensors)]

    def param(self, tensor: int) -> FloatArray:
        """Return a tensor's initial value, the same on every rank, in an array of its own."""
        start, stop = self.bounds()[tensor]
        array = np.empty(stop - start, DTYPE)
        self.fill_param(array, tensor)
        return array

    def grad(self, tensor: int) -> FloatArray:
        """Return this rank's gradient of a tensor, in an array of its own."""
        start, stop = self.bounds()[tensor]
        array = np.empty(stop - start, DTYPE)
        self.fill_grad(array, tensor)
        return array

    def fill_param(self, array: FloatArray, tensor: int) -> None:
        """Write a tensor's initial value, the same on every rank, into a C-contiguous array.

        A shorter array gets the beginning of it.
        """
        np.random.default_rng((0, tensor)).standard_normal(dtype=array.dtype, out=array)

    def fill_grad(self, array: FloatArray, tensor: int, rank: int | None = None) -> None:
        """Write a rank's gradient of a tensor, or as much as there is room for, into an array.

        Args:
            array: C-contiguous.
            tensor: Its number.
            rank: Whose gradient; None takes this rank's.
        """
        rng = np.random.default_rng((1 + (self.comm.rank if rank is None else rank), tensor))
        rng.standard_normal(dtype=array.dtype, out=array)
        array *= array.dtype.type(self.grad_size)


class Contender(Protocol):
    """A model with gradients in place, ready to take steps."""

    def step(self) -> None:
        """Average the gradients over ranks and update the parameters, on every rank."""
        ...

    def tensor(self, index: int) -> FloatArray:
        """Return the parameters in one of the tensors, flattened."""
        ...

    def close(self) -> None:
        """Free the memory. Collective: every rank."""
        ...


def require_alike(
    contenders: Mapping[str, Contender], num_tensors: int, ours: str = SHARDOPT
) -> None:
    """Make sure that all contenders have done the same work.

    Args:
        contenders: By name.
        num_tensors: Arrays to compare.
        ours: The one that the others are compared with.

    Raises:
        RuntimeError: One of them holds other parameters.
    """
    for tensor in range(num_tensors):
        expected = contenders[ours].tensor(tensor)
        for name, contender in contenders.items():
            difference = float(np.abs(contender.tensor(tensor) - expected).mean(dtype=np.float64))
            if not difference <= LARGEST_MEAN_DIFFERENCE:
                raise RuntimeError(
                    f"{name} must compute what shardopt computes; got parameters of tensor "
                    f"{tensor} that differ by {difference:.2g} on average. Fix the contender."
                )
