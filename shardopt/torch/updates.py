"""Gradients of PyTorch that are used for an update as soon as backward has computed them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from shardopt.errors import CallOrderError
from shardopt.torch.average_grad import _UNREAD
from shardopt.torch.averages import _AveragingAdapter
from shardopt.torch.reducers import wrapped_params

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from shardopt._typing import FloatArray
    from shardopt.torch.forward import ForwardHooks
    from shardopt.torch.views import View

_OPTION = "policy.update_in_backward"

_adapters: WeakSet[_UpdatingAdapter] = WeakSet()


class SpentGrad(Tensor):
    """A gradient that is gone, as ``p.grad``: whatever asks for its elements raises.

    Else ``clip_grad_norm_`` and ``GradScaler`` would find nothing there, and do nothing.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Refuse all but questions about shape and kind.

        Raises:
            CallOrderError: Always else.
        """
        if func in _UNREAD:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise _spent(getattr(func, "__name__", func))


def _spent(name: object) -> CallOrderError:
    return CallOrderError(
        f"p.grad must not be used with {_OPTION}; got a call of {name}(). Backward has updated the "
        "parameter with it, and keeps no gradient: leave the option out to clip, unscale, change "
        "or log gradients."
    )


class _UpdatingAdapter(_AveragingAdapter):
    """The adapter of ``update_in_backward``; see ``Adapter``.

    It takes gradients as stage 2 does, see [Note: gradients taken from autograd], and leaves a
    ``SpentGrad`` in their place until ``zero_grad()``, on the optimizer or the module. A backward
    that finds one would have added to a gradient that is gone, and is refused: so is that of a
    generator's loss through a discriminator that has not been frozen.
    """

    def __init__(
        self,
        names: Mapping[Tensor, str],
        comm_size: int,
        with_full_state: Collection[Tensor],
        forward_hooks: ForwardHooks | None,
    ) -> None:
        super().__init__(names, comm_size, with_full_state, forward_hooks)
        self._on_fault: Callable[[Exception], None] | None = None
        _adapters.add(self)

    def on_fault(self, listener: Callable[[Exception], None]) -> None:
        self._on_fault = listener

    def grad(self, param: Tensor, name: str) -> FloatArray | None:
        if self._is_average(param):
            raise _spent("opt.grad")
        return super().grad(param, name)

    def bind_grad(self, param: Tensor, view: View) -> None:
        self._watch(param)
        spent: Any = self._averages.get(param)
        # SpentGrad would look at each of these reads in Python, which takes time in a hook.
        with torch._C.DisableTorchFunctionSubclass():
            fits = spent is not None and (spent.shape, spent.dtype) == (param.shape, param.dtype)
        if not fits:
            value = torch.full((), float("nan"), dtype=param.dtype)
            spent = value.expand(param.shape).as_subclass(SpentGrad)
            self._averages[param] = spent
        param.grad = spent

    def end_backward(self) -> None:
        if torch._C._current_graph_task_id() == -1:
            self._report_raised()
        super().end_backward()

    def _prepare(self, param: Tensor) -> None:
        spent = param.grad
        super()._prepare(param)
        if spent is not None and spent is self._averages.get(param):
            param.grad = spent
            raise self._fault(
                f"zero_grad() must come before each backward with {_OPTION}; got a backward that "
                f"reaches {self._names.get(param, 'a parameter')!r}, whose last gradient has not "
                "been zeroed since. Call it, or freeze parameters that this backward is not meant "
                "to train, as a discriminator's under the generator's loss: requires_grad_(False)."
            )

    def _begin(self, task: int) -> None:
        self._report_raised()
        if any(other is not self and other._live_tasks() for other in _adapters):
            raise self._fault(
                f"a backward must reach the parameters of one optimizer with {_OPTION}; got "
                "another one's, too. Put all parameters into one optimizer, or leave the option "
                "out."
            )
        try:
            super()._begin(task)
        except Exception:
            self._tasks.pop(task, None)  # whoever keeps the error keeps what ends the task alive
            raise

    def _find_wrapped(self) -> None:
        wrapped = wrapped_params()
        if wrapped and any(id(param) in wrapped for param in self._records):
            raise self._fault(
                f"{_OPTION} must be False for parameters of DistributedDataParallel; got True. "
                "Leave it out, or train the module inside: its gradients are averaged in any case."
            )

    def _report_raised(self) -> None:
        """Report a backward that has not come to its end."""
        if self._tasks and not self._live_tasks():
            self._fault(
                f"a backward must come to its end with {_OPTION}; got one that has raised an "
                "exception on this rank, with some parameters updated. Load a checkpoint."
            )

    def _hand_over(self, param: Tensor) -> None:
        grad = param.grad
        if grad is not None and grad.requires_grad:
            raise self._fault(
                f"create_graph must be False with {_OPTION}; got a gradient with a graph. Leave "
                "the option out, or compute such gradients with torch.autograd.grad()."
            )
        super()._hand_over(param)

    def _fault(self, message: str) -> CallOrderError:
        """Return an error, which the step raises on all ranks."""
        error = CallOrderError(message)
        if self._on_fault is not None:
            self._on_fault(error)
        return error
