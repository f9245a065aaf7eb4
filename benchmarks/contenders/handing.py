"""Steps whose gradients are at hand, with no backward: what an optimizer itself takes.

A gradient of a mebibyte is in cache, as backward leaves it, and goes to each parameter in turn.
Stage 1 zeroes its row and adds to it in place, as a framework does that accumulates into
``p.grad``. Stage 2, with and without updates in backward, is handed each gradient as by the hooks
of PyTorch, without autograd.
"""

import importlib
from typing import Any

import numpy as np
from mpi4py import MPI

from benchmarks.contenders.internals import hooks_of
from benchmarks.contenders.problem import GRAD_SIZE
from benchmarks.harness.placing import FloatArray
from shardopt import ShardPolicy

_TENSOR_NUMEL = 1 << 18


class Handing:
    """A model of equal tensors.

    Args:
        comm: The ranks.
        numel: Parameters, rounded to whole tensors.
        policy: How to shard.
    """

    def __init__(self, comm: MPI.Intracomm, numel: int, policy: ShardPolicy) -> None:
        torch = importlib.import_module("torch")
        face = importlib.import_module("shardopt.torch")
        rng = np.random.default_rng(comm.rank)
        self._grad = rng.standard_normal(_TENSOR_NUMEL, np.float32) * np.float32(GRAD_SIZE)
        self._tensor = torch.from_numpy(self._grad)
        count = max(1, round(numel / _TENSOR_NUMEL))
        self._params = [torch.nn.Parameter(torch.zeros(_TENSOR_NUMEL)) for _ in range(count)]
        self._optimizer: Any = face.NAdam(self._params, comm=comm, policy=policy)
        self._step = self._step_in_place if policy.stage == 1 else self._step_by_hooks

    @property
    def shared_nbytes(self) -> int:
        """The memory of the node as the optimizer reports it, without late gradients."""
        report = self._optimizer.memory_report()
        return int(report.node_nbytes - report.late_node_nbytes)

    def step(self) -> None:
        """See ``Contender``."""
        self._step()

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        array: FloatArray = self._params[index].detach().numpy()
        return array

    def close(self) -> None:
        """See ``Contender``."""
        self._optimizer.close()

    def _step_in_place(self) -> None:
        self._optimizer.zero_grad(set_to_none=False)
        for param in reversed(self._params):
            if param.grad is None:
                param.grad = self._tensor.clone()
            else:
                param.grad.numpy().__iadd__(self._grad)
        self._optimizer.step()

    def _step_by_hooks(self) -> None:
        start, hand_over, end = hooks_of(self._optimizer)
        self._optimizer.zero_grad()
        start()
        for param in reversed(self._params):
            param.grad = self._tensor
            hand_over(param)
        end()
        self._optimizer.step()
