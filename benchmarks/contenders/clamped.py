"""Contenders that write to all weights after every step."""

import importlib
from typing import Any

from mpi4py import MPI

from benchmarks.contenders.faces import ShardoptTorch
from benchmarks.contenders.peers import torch_params
from benchmarks.contenders.problem import Problem
from benchmarks.harness.placing import FloatArray

LARGEST = 0.5  # of a weight; a third of them would be larger


class ClampedShardopt(ShardoptTorch):
    """``shardopt.torch`` and ``p.clamp_()``."""

    def step(self) -> None:
        """See ``Contender``."""
        super().step()
        _clamp(self._params)


class ClampedReplica:
    """torch's NAdam on weights of this rank's own, with averaged gradients, and ``p.clamp_()``."""

    def __init__(self, problem: Problem) -> None:
        torch = importlib.import_module("torch")
        self._params = torch_params(torch, problem)
        for param in self._params:  # once: the steps that are timed leave it out
            grad: FloatArray = param.grad.numpy()
            problem.comm.Allreduce(MPI.IN_PLACE, grad, MPI.SUM)
            grad /= problem.comm.size
        self._optimizer = torch.optim.NAdam(self._params)

    def step(self) -> None:
        """See ``Contender``."""
        self._optimizer.step()
        _clamp(self._params)

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        array: FloatArray = self._params[index].detach().numpy()
        return array

    def close(self) -> None:
        """See ``Contender``."""
        del self._params, self._optimizer


def _clamp(params: list[Any]) -> None:
    for param in params:
        param.detach().clamp_(-LARGEST, LARGEST)
