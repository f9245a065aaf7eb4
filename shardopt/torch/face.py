"""How the core reads and rebinds torch's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardopt.errors import PartitionError
from shardopt.params.adapter import Adapter
from shardopt.torch.tensors import as_array, as_complex, as_tensor, look_of

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
    A gradient that autograd shall accumulate into the window must be there before backward, so
    ``zero_grad`` leaves views of zeros where torch leaves None. Which parameters backward has
    reached is told by post-accumulate hooks. What users write into ``p.grad`` themselves may
    leave no trace (``p.grad.data.copy_``, ``p.grad.numpy()``), and GradScaler and
    clip_grad_norm_ touch zeros as well: a view that no hook has named counts if it is not zero.
    """

    grads_from_start = False

    def __init__(self) -> None:
        self._touched: set[Tensor] = set()
        self._hooks: dict[Tensor, Any] = {}
        self._listener: Callable[[Tensor], None] | None = None

    def name(self, param: Tensor) -> None:
        return None

    def data(self, param: Tensor, name: str) -> FloatArray:
        _require_ordinary(param, name)
        return _dense("data", name, param)

    def grad(self, param: Tensor, name: str) -> FloatArray | None:
        return None if param.grad is None else _dense("grad", name, param.grad)

    def read_entry(self, entry: Mapping[str, Any], hyper: Hyperparams) -> Mapping[str, Any]:
        return {k: as_array(v.cpu()) if isinstance(v, Tensor) else v for k, v in entry.items()}

    def view(self, param: Tensor, array: FloatArray) -> _View:
        return _View(array, param.is_complex())

    def on_grad_ready(self, listener: Callable[[Tensor], None]) -> bool:
        self._listener = listener
        return True

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

    def blank_grad(self, param: Tensor, view: _View) -> None:
        self._watch(param)
        self._show_grad(param, view)
        self._touched.discard(param)

    def holds_data(self, param: Tensor, view: _View) -> bool:
        return view.is_shown_by(param)

    def holds_grad(self, param: Tensor, view: _View) -> bool:
        return view.is_shown_by(param.grad)

    def is_blank(self, param: Tensor, view: _View) -> bool:
        return param not in self._touched and not _any_nonzero(view.array)

    def updated(self, params: Sequence[Tensor]) -> None:
        # The kernel writes past torch's back: a graph that saved the old values must not go on.
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
        param.requires_grad_(True)  # of those alone hooks are taken; a frozen one may thaw
        self._hooks[param] = param.register_post_accumulate_grad_hook(self._accumulated)
        if frozen:
            param.requires_grad_(False)

    def _accumulated(self, param: Tensor) -> None:
        self._touched.add(param)
        # A gradient with a graph of its own (create_graph) stays what it is until the step.
        if self._listener is not None and not (param.grad is None or param.grad.requires_grad):
            self._listener(param)


class _View:
    """Memory of a window, and how a tensor that shows it looks.

    The tensors it makes are new ones, and what they look like is kept as plain values: torch gives
    tensors, and the buffers that they share, other memory in place (``model.to()`` the gradients,
    ``share_memory()`` both).
    """

    __slots__ = ("_complex", "_look", "array")

    def __init__(self, array: FloatArray, is_complex: bool) -> None:
        self.array = array
        self._complex = is_complex
        self._look = look_of(self.tensor())

    @torch.inference_mode(False)  # else backward could not write to it later
    def tensor(self) -> Tensor:
        tensor = as_tensor(self.array)
        return as_complex(tensor) if self._complex else tensor

    def is_shown_by(self, tensor: Tensor | None) -> bool:
        return (
            tensor is not None
            and tensor.layout is torch.strided  # others have no address
            and look_of(tensor) == self._look
        )


def _any_nonzero(array: FloatArray) -> bool:
    """Whether anything is not zero; quick where much is not."""
    flat = array.reshape(-1)
    return any(flat[i : i + _SCAN_NUMEL].any() for i in range(0, flat.size, _SCAN_NUMEL))


def make_adapter() -> Adapter[Tensor]:
    """The face of one optimizer."""
    return _TorchAdapter()


def _require_ordinary(param: Tensor, name: str) -> None:
    problem = None
    if torch.nn.parameter.is_lazy(param):
        problem = "initialised; got a lazy one. Run the model once before"
    elif not param.is_leaf:
        problem = f"a leaf; got a result of {param.grad_fn}. Pass what it was computed from"
    elif param.is_inference():
        problem = "no inference tensor; got one. Make it outside torch.inference_mode()"
    elif getattr(param, "grad_dtype", None) not in (None, param.dtype):  # of newer torch
        problem = f"without a grad_dtype of its own; got {param.grad_dtype}. Leave it alone: "
        problem += "gradients of 16 bits are summed in float32"
    if problem is not None:
        raise PartitionError(f"parameter {name!r} must be {problem}.")


def _dense(what: str, name: str, tensor: Tensor) -> FloatArray:
    problem = None
    if tensor.layout is not torch.strided:
        problem = f"dense; got layout {tensor.layout}. Call .to_dense() on it, or give its layer "
        problem += "sparse=False"
    elif tensor.device.type != "cpu":
        problem = f"in the CPU's memory; got device {tensor.device}. Move it there"
    elif tensor.dtype not in _DTYPES:
        problem = f"floating point or complex, 16 to 128 bits; got dtype {tensor.dtype}. Convert it"
    else:
        try:
            return as_array(tensor)
        except (RuntimeError, TypeError) as error:
            problem = f"a plain tensor; got {type(tensor).__name__} ({error}). Make it local"
    raise PartitionError(f"{what} of parameter {name!r} must be {problem}.")
