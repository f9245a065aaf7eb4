"""Models whose passes take a set time without using a core, as on an accelerator."""

import functools
import time
from typing import Any

import torch

from benchmarks.contenders.problem import Problem


class _Layer(torch.autograd.Function):
    """A layer with one parameter, whose gradient is ready at a set time."""

    @staticmethod
    def forward(context: Any, value: Any, param: Any, grad: Any, ready: Any) -> Any:
        context.save_for_backward(param, grad)
        context.ready = ready
        return value.clone()

    @staticmethod
    def backward(context: Any, *above: Any) -> Any:
        context.ready()
        _, grad = context.saved_tensors
        return above[0], grad, None, None


class PacedModel:
    """As many layers as the problem has tensors; backward reaches the last one first.

    Args:
        problem: The model.
        backward_s: Seconds that backward takes, the same for each layer.

    Attributes:
        params: A tensor a layer.
    """

    def __init__(self, problem: Problem, backward_s: float) -> None:
        self._grads = [torch.from_numpy(problem.grad(i)) for i in range(problem.num_tensors)]
        self.params = [
            torch.from_numpy(problem.param(i)).requires_grad_() for i in range(problem.num_tensors)
        ]
        self._layer_s = backward_s / problem.num_tensors
        self._due_s = 0.0

    def backward(self) -> None:
        """Add to all gradients. A layer that is late does not delay the others."""
        value: Any = torch.zeros((), requires_grad=True)
        apply: Any = _Layer.apply  # untyped
        for param, grad in zip(self.params, self._grads, strict=True):
            value = apply(value, param, grad, self._await_turn)
        self._due_s = time.perf_counter()
        value.backward()

    def _await_turn(self) -> None:
        self._due_s += self._layer_s
        time.sleep(max(0.0, self._due_s - time.perf_counter()))


class _PacedLayer(torch.nn.Module):
    """A layer with one parameter, whose passes take a set time from when they can begin."""

    def __init__(self, param: torch.Tensor, grad: torch.Tensor, seconds: float) -> None:
        super().__init__()
        self.param = torch.nn.Parameter(param)
        self._grad = grad
        self._pass = functools.partial(time.sleep, seconds)

    def forward(self, value: Any) -> Any:
        self._pass()
        apply: Any = _Layer.apply  # untyped
        return apply(value, self.param, self._grad, self._pass)


class PacedModule(torch.nn.Sequential):
    """As many layers as the problem has tensors; one that is late delays all that follow.

    Args:
        problem: The model.
        pass_s: Seconds that forward takes, and backward, the same for each layer.
    """

    def __init__(self, problem: Problem, pass_s: float) -> None:
        numbers = range(problem.num_tensors)
        layer_s = pass_s / problem.num_tensors
        params = [torch.from_numpy(problem.param(i)) for i in numbers]
        grads = [torch.from_numpy(problem.grad(i)) for i in numbers]
        pairs = zip(params, grads, strict=True)
        super().__init__(*(_PacedLayer(param, grad, layer_s) for param, grad in pairs))

    def backward(self) -> None:
        """Go forward and backward, and add to all gradients."""
        self(torch.zeros((), requires_grad=True)).backward()
