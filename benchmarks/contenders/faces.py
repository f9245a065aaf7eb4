"""This project through each framework, as contenders of a step."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contenders.names import (
    SHARDOPT,
    THROUGH_JAX,
    THROUGH_LUCID,
    THROUGH_TORCH,
    THROUGH_TORCH_BFLOAT16,
)
from benchmarks.contenders.ours import Shardopt
from benchmarks.contenders.problem import Contender, Problem
from benchmarks.harness.placing import FloatArray


class ShardoptTorch(Shardopt):
    """``shardopt.torch``, with gradients in ``p.grad`` as autograd leaves them."""

    def __init__(self, problem: Problem, dtype: str = "float32", device: str = "cpu") -> None:
        torch = importlib.import_module("torch")
        face = importlib.import_module("shardopt.torch")
        kind = getattr(torch, dtype)
        self._params = [
            torch.from_numpy(problem.param(tensor)).to(device, kind).requires_grad_()
            for tensor in range(problem.num_tensors)
        ]
        self._optimizer = face.NAdam(self._params, comm=problem.comm)
        for tensor, param in enumerate(self._params):
            grad = torch.from_numpy(problem.grad(tensor)).to(device, kind)
            (param * grad).sum().backward()

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        array: FloatArray = self._params[index].detach().float().cpu().numpy()
        return array


class ShardoptJax:
    """``shardopt.jax``: gradients come in as jax arrays, parameters go out as new ones."""

    def __init__(self, problem: Problem) -> None:
        jnp = importlib.import_module("jax.numpy")
        face = importlib.import_module("shardopt.jax")
        params = [jnp.array(problem.param(tensor)) for tensor in range(problem.num_tensors)]
        self._optimizer = face.NAdam(params, comm=problem.comm)
        self._grads = [jnp.array(problem.grad(tensor)) for tensor in range(problem.num_tensors)]
        self._params: Any = None

    def step(self) -> None:
        """See ``Contender``."""
        self._params = self._optimizer.step(self._grads)

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        return np.asarray(self._params[index])

    def close(self) -> None:
        """See ``Contender``."""
        self._optimizer.close()
        del self._params, self._grads


class ShardoptLucid:
    """``shardopt.lucid``, with gradients as lucid's backward leaves them: arrays of their own."""

    def __init__(self, problem: Problem) -> None:
        lucid = importlib.import_module("lucid.nn")
        face = importlib.import_module("shardopt.lucid")
        self._params = [
            lucid.Parameter(problem.param(tensor)) for tensor in range(problem.num_tensors)
        ]
        self._grads = [problem.grad(tensor) for tensor in range(problem.num_tensors)]
        self._optimizer = face.NAdam(self._params, comm=problem.comm)

    def step(self) -> None:
        """See ``Contender``."""
        for param, grad in zip(self._params, self._grads, strict=True):
            param.grad = grad
        self._optimizer.step()

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        array: FloatArray = self._params[index].data
        return array

    def close(self) -> None:
        """See ``Contender``."""
        self._optimizer.close()
        del self._params, self._grads


FACES: dict[str, tuple[str | None, Callable[[Problem], Contender]]] = {
    SHARDOPT: (None, Shardopt),
    THROUGH_TORCH: ("torch", ShardoptTorch),
    THROUGH_TORCH_BFLOAT16: ("torch", lambda problem: ShardoptTorch(problem, "bfloat16")),
    THROUGH_JAX: ("jax", ShardoptJax),
    THROUGH_LUCID: ("lucid", ShardoptLucid),
}
"""The module that each face needs, and the function that makes it."""


def installed_faces() -> dict[str, Callable[[Problem], Contender]]:
    """Return the faces whose frameworks are installed."""
    found = {}
    for name, (module, make) in FACES.items():
        try:
            importlib.import_module(module or "shardopt")
        except ImportError:
            continue
        found[name] = make
    return found
