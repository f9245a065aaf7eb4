"""``optax.nadam`` on every rank, for gradients that MPI averages."""

from typing import Any

import jax
import numpy as np
import optax
from mpi4py import MPI

from benchmarks.contenders.problem import DTYPE, LR, Problem
from benchmarks.harness.placing import FloatArray


class OptaxReplica:
    """``Allreduce`` of all gradients at once, then ``optax.nadam`` under jit.

    Parameters and state are donated to the jitted update, as JAX advises. JAX's own collectives
    would need a job of their own for each number of ranks.
    """

    def __init__(self, problem: Problem) -> None:
        self._comm, self._bounds = problem.comm, problem.bounds()
        self._grads = np.empty(problem.numel, DTYPE)
        self._sums = np.empty(problem.numel, DTYPE)
        for tensor, bounds in enumerate(self._bounds):
            problem.fill_grad(self._grads[slice(*bounds)], tensor)
        self._params = [jax.numpy.array(problem.param(i)) for i in range(problem.num_tensors)]
        optimizer, size = optax.nadam(LR), problem.comm.size
        self._state = optimizer.init(self._params)

        def update(params: Any, state: Any, sums: Any) -> Any:
            grads = jax.tree.map(lambda total: total / size, sums)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._update = jax.jit(update, donate_argnums=(0, 1))

    def step(self) -> None:
        """See ``Contender``."""
        self._comm.Allreduce(self._grads, self._sums, MPI.SUM)
        sums = [jax.numpy.asarray(self._sums[slice(*bounds)]) for bounds in self._bounds]
        wait: Any = jax.block_until_ready  # untyped
        self._params, self._state = wait(self._update(self._params, self._state, sums))

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        return np.asarray(self._params[index])

    def close(self) -> None:
        """See ``Contender``."""
        del self._params, self._state, self._grads, self._sums
