"""Contenders whose gradients come from PyTorch's backward, as their hooks ask for.

Backward computes nothing but hands out gradients that exist, so that a step is what its optimizer
and its communication take.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contenders.problem import Problem
from benchmarks.harness.placing import FloatArray
from shardopt import ShardPolicy


class _Given(torch.autograd.Function):
    """A layer whose gradient is given."""

    @staticmethod
    def forward(context: Any, value: Any, param: Any, grad: Any) -> Any:
        context.grad = grad
        return value.clone()

    @staticmethod
    def backward(context: Any, *above: Any) -> Any:
        return above[0], context.grad, None


class _Layer(torch.nn.Module):
    def __init__(self, problem: Problem, tensor: int) -> None:
        super().__init__()
        self.param = torch.nn.Parameter(torch.from_numpy(problem.param(tensor)))
        self._grad = torch.from_numpy(problem.grad(tensor))

    def forward(self, value: Any) -> Any:
        apply: Any = _Given.apply  # untyped
        return apply(value, self.param, self._grad)


def _make_model(problem: Problem) -> Any:
    return torch.nn.Sequential(*(_Layer(problem, i) for i in range(problem.num_tensors)))


class BehindBackward:
    """A model whose parameters are updated after a backward.

    Args:
        model: What is called.
        params: Its parameters, a tensor each.
        optimizer: Updates them.
        close: Ends the optimizer.
    """

    def __init__(
        self, model: Any, params: list[Any], optimizer: Any, close: Callable[[], None] | None = None
    ) -> None:
        self._model, self._params, self._optimizer, self._close = model, params, optimizer, close

    def step(self) -> None:
        """See ``Contender``."""
        self._optimizer.zero_grad()
        self._model(torch.zeros((), requires_grad=True)).backward()
        self._optimizer.step()

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``. Collective: every rank, as shards are gathered."""
        param = self._params[index].detach()
        array: FloatArray = getattr(param, "full_tensor", lambda: param)().numpy()
        return array

    def close(self) -> None:
        """See ``Contender``."""
        if self._close is not None:
            self._close()
        del self._model, self._params, self._optimizer


def shardopt_behind(problem: Problem, policy: ShardPolicy) -> BehindBackward:
    """Make ``shardopt.torch``."""
    model = _make_model(problem)
    params = list(model.parameters())
    face = importlib.import_module("shardopt.torch")
    optimizer = face.NAdam(params, comm=problem.comm, policy=policy)
    return BehindBackward(model, params, optimizer, optimizer.close)


def ddp(problem: Problem) -> BehindBackward:
    """Make DistributedDataParallel with gradients in its buckets, and NAdam on every rank."""
    model = DistributedDataParallel(
        _make_model(problem), process_group=problem.group, gradient_as_bucket_view=True
    )
    params = list(model.parameters())
    return BehindBackward(model, params, torch.optim.NAdam(params))


def fsdp2(problem: Problem) -> BehindBackward:
    """Make FSDP2: ``fully_shard`` on each layer, then on the model, and NAdam on the shards.

    Parameters are gathered once in a step, as ``reshard_after_forward=False`` keeps them until
    backward: the faster way if there is memory for it.
    """
    model = _make_model(problem)
    group: Any = torch.distributed.group.WORLD if problem.group is None else problem.group
    mesh = DeviceMesh.from_group(group, "cpu")
    for part in (*model, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    params = list(model.parameters())
    return BehindBackward(model, params, torch.optim.NAdam(params))
