"""This project in NumPy, as a contender of a step; see ``faces`` for the other frameworks."""

from typing import Any

from benchmarks.contenders.problem import DTYPE, Problem
from benchmarks.harness.placing import FloatArray
from shardopt import ShardPolicy
from shardopt.numpy import NAdam, Parameter

_DEFAULTS = ShardPolicy()


class Shardopt:
    """This project.

    Args:
        problem: The model.
        policy: How to shard.
        dtype: Of the parameters.
        variant: Whose rule is followed, as in ``NAdam``.
    """

    def __init__(
        self,
        problem: Problem,
        policy: ShardPolicy = _DEFAULTS,
        dtype: str = DTYPE,
        variant: str = "torch",
    ) -> None:
        self._params: list[Any] = [
            Parameter(problem.param(tensor).astype(dtype, copy=False), f"tensor{tensor}")
            for tensor in range(problem.num_tensors)
        ]
        self._optimizer: Any = NAdam(
            self._params, variant=variant, comm=problem.comm, policy=policy
        )
        for tensor, param in enumerate(self._params):
            param.grad[...] = problem.grad(tensor)

    @property
    def optimizer(self) -> Any:
        """The optimizer."""
        return self._optimizer

    def step(self) -> None:
        """See ``Contender``."""
        self._optimizer.step()

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        data: FloatArray = self._params[index].data
        return data

    def close(self) -> None:
        """See ``Contender``."""
        params, self._params = self._params, []
        for param in params:  # so that no rank is given a copy of its own
            param.data = param.data[:0]
        del param
        self._optimizer.close()
