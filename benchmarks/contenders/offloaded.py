"""An optimizer whose parameters are on a device that is made of memory, and whose updates are not.

The device is that of the tests: it copies as a GPU would, in queues beside the host, over a link of
a certain rate. Unlike a GPU it needs a core for that, which the kernel does not have meanwhile.
"""

import functools
import importlib
from typing import Any

from benchmarks.contenders.internals import devices_made_by
from benchmarks.contenders.problem import Problem
from benchmarks.harness.placing import FloatArray
from shardopt import ShardPolicy
from shardopt.numpy import NAdam, Parameter

_arena_device: Any = importlib.import_module("tests.support.arena_device")
_queued_device: Any = importlib.import_module("tests.support.queued_device")


class Offloaded:
    """This project, with ``policy.offload``.

    Args:
        problem: The model.
        rate: Bytes that the link carries each way in a second; None for as many as memcpy does.
        are_beside: Whether copies run beside the kernel, as they do; else before it and after.
    """

    def __init__(self, problem: Problem, rate: float | None, *, are_beside: bool) -> None:
        self._params: list[Any] = [
            Parameter(_arena_device.on_device(problem.param(tensor)), f"tensor{tensor}")
            for tensor in range(problem.num_tensors)
        ]
        policy = ShardPolicy(offload="cpu", threads=problem.threads)
        kind = functools.partial(_queued_device.QueuedDevice, rate=rate)
        with devices_made_by(kind, are_beside=are_beside):
            self._optimizer: Any = NAdam(self._params, comm=problem.comm, policy=policy)
        for tensor, param in enumerate(self._params):
            _arena_device.fill(param.grad, problem.grad(tensor))

    def step(self) -> None:
        """See ``Contender``."""
        self._optimizer.step()

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        values: FloatArray = _arena_device.memory_of(self._params[index].data)
        return values

    def close(self) -> None:
        """See ``Contender``."""
        self._params.clear()
        self._optimizer.close()
