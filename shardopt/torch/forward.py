"""Hooks on the modules of a model that wait for parameters on their way to this node."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import Module, MultiheadAttention, Parameter, TransformerEncoderLayer

from shardopt.errors import HyperparamsError
from shardopt.torch.module import COMPILED, unwrap

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardopt.params.adapter import ParamsListener

_READ_THEIR_CHILDREN = MultiheadAttention, TransformerEncoderLayer  # without calling them
_COPY_HOOK = "_shardopt_copies"


def why_not_prefetch(model: Any) -> HyperparamsError | None:
    """Return why forward passes of a model cannot wait for parameters, or None if they can.

    Args:
        model: The first argument of an optimizer.
    """
    if not isinstance(model, Module):
        return HyperparamsError(
            "policy.prefetch_params must be False unless params is a module, whose forward waits "
            f"for its parameters; got a {type(model).__name__}. Pass the module itself."
        )
    return _compiled_error() if any(map(_is_compiled, model.modules())) else None


def _is_compiled(module: Module) -> bool:
    """Whether a module was compiled, by ``torch.compile`` or ``torch.jit``."""
    is_wrapper = COMPILED in module._modules
    is_script = isinstance(module, torch.jit.ScriptModule)
    return is_wrapper or is_script or module._compiled_call_impl is not None


def _compiled_error() -> HyperparamsError:
    return HyperparamsError(
        "policy.prefetch_params must be False with a compiled model, whose modules read parameters "
        "without their hooks; got True. Leave it out, or do not compile the model."
    )


@_disable_dynamo  # a compiled forward calls it as it runs
def _refuse_compiled() -> None:
    raise _compiled_error()


class ForwardHooks:
    """The hooks on all modules of a model.

    A module waits for its own parameters before it runs, and for those of modules inside of it that
    are never called themselves, such as ``ParameterList``. What looks at a whole module waits for
    all parameters: ``state_dict``, ``load_state_dict``, ``copy.deepcopy`` and pickle. Copies of a
    module wait for nothing.

    Args:
        model: The model, maybe in a wrapper.
    """

    def __init__(self, model: Module) -> None:
        self._modules = list(unwrap(model).modules())
        self._handles: list[Any] = []
        self._listener: weakref.ref[ParamsListener] | None = None

    def attach(self, listener: ParamsListener | None) -> None:
        """Have the hooks tell a listener, or remove them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._modules:
            vars(module).pop(_COPY_HOOK, None)
        self._listener = None if listener is None else weakref.ref(listener)
        if listener is not None:
            for module in self._modules:
                self._attach(module, weakref.ref(listener))

    def reach(self, param: Tensor) -> None:
        """Report a parameter whose gradient backward has computed, if there is a listener."""
        if self._listener is not None and (listener := self._listener()) is not None:
            listener.reach(param)

    def _attach(self, module: Module, listener: weakref.ref[ParamsListener]) -> None:
        whole = _WaitForAll(listener)
        if params := list(_read_by(module)):
            hook = _WaitForOwn(listener, params)
            self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
        untyped: Any = module
        self._handles.append(untyped.register_state_dict_pre_hook(whole))
        self._handles.append(untyped.register_load_state_dict_pre_hook(whole))
        # Whatever copies or pickles a module goes through its attributes in order.
        attributes = dict(vars(module))
        vars(module).clear()
        vars(module).update({_COPY_HOOK: whole, **attributes})


class _Hook:
    """A hook that waits before it is copied, and does nothing in the copy of a module."""

    def __init__(self, listener: weakref.ref[ParamsListener] | None = None) -> None:
        self._listener = listener

    def _alive(self) -> ParamsListener | None:
        return None if self._listener is None else self._listener()

    def __reduce__(self) -> Any:
        if (listener := self._alive()) is not None:
            listener.finish()
        return type(self), ()


class _WaitForOwn(_Hook):
    """Waits for some parameters before a forward."""

    def __init__(
        self,
        listener: weakref.ref[ParamsListener] | None = None,
        params: Sequence[Parameter] = (),
    ) -> None:
        super().__init__(listener)
        self._params = params

    def __call__(self, *args: object) -> None:
        is_compiling = torch.compiler.is_compiling() or _is_tracing()
        if is_compiling and self._listener is not None:
            _refuse_compiled()
        if (listener := self._alive()) is not None:
            listener.need(self._params)


class _WaitForAll(_Hook):
    """Waits for all parameters."""

    def __call__(self, *args: object) -> None:
        if (listener := self._alive()) is not None:
            listener.finish()


def _read_by(module: Module) -> Iterator[Parameter]:
    """Yield the parameters that a module reads without calling the module that owns them."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        is_called = type(child).forward is not Module.forward
        if isinstance(module, _READ_THEIR_CHILDREN) or not is_called:
            yield from _read_by(child)


def _is_tracing() -> bool:
    """Whether ``torch.jit.trace`` records what the model does."""
    return torch._C._get_tracing_state() is not None
