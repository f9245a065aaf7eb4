"""The adapter of PyTorch: how the core reads and binds torch's parameters."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardopt.errors import PartitionError
from shardopt.params.adapter import Adapter, array_error
from shardopt.torch.tensors import as_array, as_complex, as_tensor, layout_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shardopt._typing import FloatArray
    from shardopt.rule.nadam import Hyperparams

_SCAN_NUMEL = 1 << 14
_DTYPES = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}


class _TorchAdapter(Adapter[Tensor]):
    """See ``Adapter``.

    [Note: None unless touched]
    For autograd to accumulate into shared memory, ``p.grad`` must be bound before backward, so
    ``zero_grad`` leaves views of zeros where torch leaves None. Post-accumulate hooks record which
    parameters backward has reached. Users may write into ``p.grad`` without leaving a trace
    (``p.grad.data.copy_``, ``p.grad.numpy()``), and GradScaler and clip_grad_norm_ write to zeros
    as well. A view without a hook call therefore counts as a gradient only if it is not all zero.
    """

    grads_from_start = False
    reports_grads = True
    step_dtype = "float32"

    def __init__(self) -> None:
        self._touched: set[Tensor] = set()
        self._hooks: dict[Tensor, Any] = {}
        self._listener: Callable[[Tensor], None] | None = None

    def name(self, param: Tensor) -> None:
        return None

    def data(self, param: Tensor, name: str) -> FloatArray:
        _require_ordinary(param, name)
        return _dense_array("data", name, param)

    def value(self, value: Any, name: str) -> FloatArray:
        return _dense_array("data", name, torch.as_tensor(value).detach())

    def grad(self, param: Tensor, name: str) -> FloatArray | None:
        return None if param.grad is None else _dense_array("grad", name, param.grad)

    def read_entry(self, entry: Mapping[str, Any], hyper: Hyperparams) -> Mapping[str, Any]:
        return {k: as_array(v.cpu()) if isinstance(v, Tensor) else v for k, v in entry.items()}

    def from_array(self, array: FloatArray, like: Tensor | None) -> Tensor:
        tensor = as_tensor(array)
        return tensor if like is None or not like.is_complex() else as_complex(tensor)

    def from_number(self, number: FloatArray) -> Tensor:
        return as_tensor(number)

    def view(self, param: Tensor, array: FloatArray) -> _View:
        return _View(array, param.is_complex())

    def on_grad_ready(self, listener: Callable[[Tensor], None]) -> None:
        self._listener = listener

    def grad_version(self, param: Tensor) -> object:
        grad = param.grad
        return None if grad is None or grad.is_inference() else (id(grad), grad._version)

    def bind_data(self, param: Tensor, view: _View) -> None:
        param.data = view.tensor()

    def bind_grad(self, param: Tensor, view: _View) -> None:
        if self._listener is not None:
            self._watch(param)
        self._show_grad(param, view)
        self._touched.add(param)

    def clear_grad(self, param: Tensor, view: _View) -> None:
        self._watch(param)
        self._show_grad(param, view)
        self._touched.discard(param)

    def requires_grad(self, param: Tensor) -> bool:
        return param.requires_grad

    def unbind_grad(self, param: Tensor) -> None:
        self._watch(param)  # it may be unfrozen
        param.grad = None
        self._touched.discard(param)

    def holds_data(self, param: Tensor, view: _View) -> bool:
        return view.is_shown_by(param)

    def holds_grad(self, param: Tensor, view: _View) -> bool:
        return view.is_shown_by(param.grad)

    def is_clear(self, param: Tensor, view: _View) -> bool:
        return param not in self._touched and not _any_nonzero(view.array)

    def bump_version(self, params: Sequence[Tensor]) -> None:
        # torch does not see the kernel's writes: a graph that saved the old values must not run.
        torch.autograd.graph.increment_version(params)

    def release(self, param: Tensor) -> None:
        param.grad = None
        self._touched.discard(param)
        hook = self._hooks.pop(param, None)
        if hook is not None:
            hook.remove()

    def _show_grad(self, param: Tensor, view: _View) -> None:
        grad = param.grad
        if grad is None or grad.requires_grad or not view.is_shown_by(grad):
            param.grad = view.tensor()

    def _watch(self, param: Any) -> None:
        if param in self._hooks:
            return
        frozen = not param.requires_grad
        param.requires_grad_(True)  # the hook demands it, and frozen ones may thaw
        adapter = weakref.ref(self)  # torch keeps hooks where Python finds no garbage

        def accumulated(param: Tensor) -> None:
            if (alive := adapter()) is not None:
                alive._accumulated(param)

        self._hooks[param] = param.register_post_accumulate_grad_hook(accumulated)
        if frozen:
            param.requires_grad_(False)

    def _accumulated(self, param: Tensor) -> None:
        self._touched.add(param)
        # A gradient with a graph of its own (create_graph) stays as it is until the step.
        if self._listener is not None and not (param.grad is None or param.grad.requires_grad):
            self._listener(param)


class _View:
    """A part of shared memory, and the layout of a tensor over it.

    Each call of ``tensor`` makes a new tensor, and the layout is kept as plain values, because
    torch may replace the memory of an existing tensor in place (``model.to()`` that of gradients,
    ``share_memory()`` even that of the storage).
    """

    __slots__ = ("_complex", "_layout", "array")

    def __init__(self, array: FloatArray, is_complex: bool) -> None:
        self.array = array
        self._complex = is_complex
        self._layout = layout_of(self.tensor())

    @torch.inference_mode(False)  # so that backward can write to it later
    def tensor(self) -> Tensor:
        tensor = as_tensor(self.array)
        return as_complex(tensor) if self._complex else tensor

    def is_shown_by(self, tensor: Tensor | None) -> bool:
        return (
            tensor is not None
            and tensor.layout is torch.strided  # other layouts have no address
            and layout_of(tensor) == self._layout
        )


def _any_nonzero(array: FloatArray) -> bool:
    """Return whether any element is not zero; fast if many are."""
    flat = array.reshape(-1)
    return any(flat[i : i + _SCAN_NUMEL].any() for i in range(0, flat.size, _SCAN_NUMEL))


def make_adapter() -> Adapter[Tensor]:
    """Return a new adapter; each optimizer needs its own."""
    return _TorchAdapter()


def _require_ordinary(param: Tensor, name: str) -> None:
    problem = None
    if torch.nn.parameter.is_lazy(param):
        problem = "initialised; got a lazy one. Run the model once first"
    elif not param.is_leaf:
        problem = f"a leaf; got a result of {param.grad_fn}. Pass the tensor it was computed from"
    elif param.is_inference():
        problem = "no inference tensor; got one. Make it outside torch.inference_mode()"
    elif getattr(param, "grad_dtype", None) not in (None, param.dtype):  # newer than torch 2.6
        problem = f"without a grad_dtype of its own; got {param.grad_dtype}. Leave it alone: "
        problem += "gradients of 16 bits are summed in float32"
    if problem is not None:
        raise PartitionError(f"parameter {name!r} must be {problem}.")


def _dense_array(role: str, name: str, tensor: Tensor) -> FloatArray:
    if tensor.layout is not torch.strided:
        remedy = "Call .to_dense() on it, or construct its layer with sparse=False"
        raise array_error(role, name, rule="dense", got=f"layout {tensor.layout}", remedy=remedy)
    if tensor.device.type != "cpu":
        rule, got = "in the CPU's memory", f"device {tensor.device}"
        raise array_error(role, name, rule=rule, got=got, remedy="Move it there")
    if tensor.dtype not in _DTYPES:
        rule, got = "floating point or complex, 16 to 128 bits", f"dtype {tensor.dtype}"
        raise array_error(role, name, rule=rule, got=got, remedy="Convert it")
    try:
        return as_array(tensor)
    except (RuntimeError, TypeError) as error:
        got = f"{type(tensor).__name__} ({error})"
        raise array_error(
            role, name, rule="a plain tensor", got=got, remedy="Make it local"
        ) from error
