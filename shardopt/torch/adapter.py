"""The adapter of PyTorch: how the core reads and binds torch's parameters."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from shardopt.backends.base import is_on_device
from shardopt.backends.devices import HOST
from shardopt.errors import HyperparamsError, PartitionError
from shardopt.params.adapter import Adapter, array_error
from shardopt.torch import devices
from shardopt.torch.checking import dense_array, require_dense, require_ordinary, require_whole
from shardopt.torch.module import load_module, read_module
from shardopt.torch.profiling import annotate
from shardopt.torch.tensors import as_complex, as_host_array, as_tensor
from shardopt.torch.views import View

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from shardopt._typing import FloatArray
    from shardopt.params.adapter import ParamsListener
    from shardopt.params.model import ModelContent
    from shardopt.rule.hyperparams import Hyperparams
    from shardopt.torch.forward import ForwardHooks

_SCAN_NUMEL = 1 << 14
_SAMPLE_NUMEL = 64
_MAX_SAMPLED = 8  # clipping changes all gradients: a few tell


class _TorchAdapter(Adapter[Tensor]):
    """See ``Adapter``.

    [Note: None unless touched]
    For autograd to accumulate into shared memory, ``p.grad`` must be bound before backward, so
    ``zero_grad`` leaves views of zeros where torch leaves None. Post-accumulate hooks record which
    parameters backward has reached. Users may write into ``p.grad`` without leaving a trace
    (``p.grad.data.copy_``, ``p.grad.numpy()``), and GradScaler and clip_grad_norm_ write to zeros
    as well. A view without a hook call therefore counts as a gradient only if it is not all zero.

    On a device a look at the elements waits for all work there. So a view is looked at only if
    torch has counted a write to it. A write that torch does not count (``p.grad.data.copy_``) to
    the gradient of a parameter that no backward has reached is lost there: write to ``p.grad``.

    Where ``p.grad`` is None, as ``model.zero_grad()`` leaves it, autograd makes a tensor of its
    own. The post-accumulate hook copies it into shared memory while it is in cache, and binds the
    view, to which later backward passes add in place. That takes less time than to bind zeros
    beforehand. A gradient with a graph of its own (``create_graph``) stays as it is until the step.
    """

    grads_from_start = False
    reports_grads = True
    shows_averages = False
    widens_grads = False
    step_dtype = "float32"
    annotate = staticmethod(annotate)

    def __init__(
        self,
        names: Mapping[Tensor, str],
        comm_size: int,
        with_full_state: Collection[Tensor],
        forward_hooks: ForwardHooks | None,
    ) -> None:
        self.copied_nbytes = 0
        self._with_full_state = frozenset(with_full_state)
        self._num_sampled = 0
        self._versions: dict[Tensor, int] = {}
        self._place: str | None = None  # of all parameters, once one is known
        self._names = dict(names)  # no weak references: torch swaps no tensor that has one
        self._comm_size = comm_size
        self._records: dict[Tensor, _Record] = {}
        self._forward_hooks = forward_hooks
        self.reports_forward = forward_hooks is not None
        self._on_ready: Callable[[Tensor], None] | None = None
        self._on_backward: Callable[[], None] | None = None

    def keeps_full_state(self, param: Tensor) -> bool:
        return param in self._with_full_state

    def name(self, param: Tensor) -> str | None:
        if not isinstance(param, Tensor):
            raise PartitionError(
                f"params must hold tensors; got {type(param).__name__}. Pass the model's "
                "parameters, such as model.parameters()."
            )
        return self._names.get(param)

    def data(self, param: Tensor, name: str) -> FloatArray:
        require_ordinary(param, name)
        place = devices.place_of(param)
        if self._place not in (None, place):
            rule, remedy = f"on {self._place}, where it was", "Build the optimizer after that move"
            raise array_error("data", name, rule=rule, got=f"it on {place}", remedy=remedy)
        require_whole(param, name, self._comm_size)
        return dense_array("data", name, param)

    def value(self, value: Any, name: str) -> FloatArray:
        tensor = torch.as_tensor(value).detach()
        require_dense("data", name, tensor)
        return as_host_array(tensor.cpu())

    def grad(self, param: Tensor, name: str) -> FloatArray | None:
        return None if param.grad is None else dense_array("grad", name, param.grad)

    def read_entry(self, entry: Mapping[str, Any], hyper: Hyperparams) -> Mapping[str, Any]:
        return {k: as_host_array(v.cpu()) if isinstance(v, Tensor) else v for k, v in entry.items()}

    def from_array(self, array: FloatArray, like: Tensor | None) -> Tensor:
        tensor = as_tensor(array)
        return tensor if like is None or not like.is_complex() else as_complex(tensor)

    def from_number(self, number: FloatArray) -> Tensor:
        return as_tensor(number)

    def view(self, param: Tensor, array: FloatArray) -> View:
        return View(array, param.is_complex())

    def on_grad_ready(self, listener: Callable[[Tensor], None]) -> None:
        self._on_ready = listener

    def on_params_needed(self, listener: ParamsListener | None) -> None:
        if self._forward_hooks is not None:
            self._forward_hooks.attach(listener)

    def on_backward(self, listener: Callable[[], None] | None) -> None:
        self._on_backward = listener

    def on_backward_ends(self, on_start: Callable[[], None], on_end: Callable[[], None]) -> None:
        pass  # a gradient counts when it is accumulated

    def on_fault(self, listener: Callable[[Exception], None]) -> None:
        pass  # the step finds what is wrong

    def on_grad_read(self, listener: Callable[[], None]) -> None:
        pass  # what is bound is this rank's own

    def note_averages(self, *, are_shown: bool) -> None:
        """Do nothing; see ``on_grad_read``."""

    def end_backward(self) -> None:
        pass

    def own_grad(self, param: Tensor, view: View, *, zeros: bool) -> None:
        values = view.tensor()
        param.grad = torch.zeros_like(values) if zeros else values.clone()

    def grad_factors(self) -> Mapping[int, tuple[Sequence[float], Sequence[float]]]:
        return {}

    def forget_factors(self, param: Tensor) -> None:
        pass

    def grad_version(self, param: Tensor) -> object:
        grad = param.grad
        return None if grad is None or grad.is_inference() else (id(grad), grad._version)

    def were_grads_written(self, num_allowed: int) -> bool:
        """See ``Adapter``.

        A clip that leaves gradients alone multiplies them by 1, and torch counts the write. So the
        first writes that it counts only have samples taken after each later backward.
        """
        written = []
        for param, record in self._records.items():
            if (left := record.left_by_backward) is not None:
                record.left_by_backward = None
                grad = param.grad
                if grad is left.grad and grad._version > left.version + num_allowed:
                    if left.sample is None:
                        record.is_sampled = record.is_sampled or self._num_sampled < _MAX_SAMPLED
                        self._num_sampled += record.is_sampled
                    elif not torch.equal(_sample_of(grad), left.sample):
                        written.append(grad)
        # Zeros are what is left of a gradient that nobody wants; see [Note: None unless touched].
        return not _others_average() and any(bool(grad.any()) for grad in written)

    def bind_data(self, param: Tensor, view: View) -> None:
        param.data = view.tensor()

    def bind_grad(self, param: Tensor, view: View) -> None:
        self._show_grad(param, view, is_touched=True)

    def clear_grad(self, param: Tensor, view: View) -> None:
        self._show_grad(param, view, is_touched=False)

    def device(self, param: Tensor) -> str:
        place = devices.place_of(param)
        self._place = self._place or place
        return place

    def current_queue(self) -> int:
        return devices.current_queue(self._place or HOST)

    def note_value(self, param: Tensor) -> None:
        self._versions[param] = param._version

    def was_written(self, param: Tensor) -> bool:
        return param._version != self._versions.get(param, param._version)

    def requires_grad(self, param: Tensor) -> bool:
        return param.requires_grad

    def unbind_grad(self, param: Tensor) -> None:
        self._watch(param).reset(None)  # it may be unfrozen
        param.grad = None

    def holds_data(self, param: Tensor, view: View) -> bool:
        return view.is_shown_by(param)

    def holds_grad(self, param: Tensor, view: View) -> bool:
        return view.is_shown_by(param.grad)

    def is_clear(self, param: Tensor, view: View) -> bool:
        record = self._records[param]
        if record.is_touched:
            return False
        if not is_on_device(view.array):
            return not _any_nonzero(view.array)
        grad = param.grad
        return self.grad_version(param) == record.cleared or grad is None or not bool(grad.any())

    def bump_version(self, params: Sequence[Tensor]) -> None:
        # torch does not see the kernel's writes: a graph that saved the old values must not run.
        torch.autograd.graph.increment_version(params)
        for param in params if self._versions else ():
            if param in self._versions:
                self._versions[param] += 1  # this is no write of the user

    def detach(self, param: Tensor) -> None:
        self._names.pop(param, None)
        self._versions.pop(param, None)
        record = self._records.pop(param, None)
        if record is not None:
            record.hook.remove()
            self._num_sampled -= record.is_sampled

    def release(self, param: Tensor) -> None:
        param.grad = None
        self.detach(param)

    def check_group(self, group: Mapping[str, Any]) -> None:
        for name in ("capturable", "differentiable"):
            if group.get(name):
                raise HyperparamsError(
                    f"{name} must be False; got {group[name]}. The step is one pass of a kernel "
                    "that neither CUDA graphs nor autograd can record: use torch's own optimizer."
                )

    def read_model(
        self, model: Any, params: Sequence[Tensor], saved: Collection[str] | None
    ) -> ModelContent:
        return read_module(model, params)

    def load_model(
        self, model: Any, params: Sequence[Tensor], content: ModelContent, values: Mapping[str, Any]
    ) -> tuple[Any, Sequence[str]]:
        return load_module(model, content, values)

    def _show_grad(self, param: Tensor, view: View, *, is_touched: bool) -> None:
        self._watch(param).reset(view, is_touched=is_touched)
        grad = param.grad
        if grad is None or grad.requires_grad or not view.is_shown_by(grad):
            param.grad = view.tensor()
        if not is_touched:
            self._records[param].cleared = self.grad_version(param)

    def _watch(self, param: Any) -> _Record:
        record = self._records.get(param)
        if record is not None:
            return record
        frozen = not param.requires_grad
        param.requires_grad_(True)  # the hook demands it, and frozen ones may thaw
        adapter = weakref.ref(self)  # torch keeps hooks where Python finds no garbage

        def accumulated(param: Tensor) -> None:
            if (alive := adapter()) is not None:
                alive._accumulated(param)

        record = _Record(param.register_post_accumulate_grad_hook(accumulated))
        self._records[param] = record
        if frozen:
            param.requires_grad_(False)
        return record

    def _accumulated(self, param: Tensor) -> None:
        if self._forward_hooks is not None:
            self._forward_hooks.reach(param)
        if self._on_backward is not None:
            self._on_backward()
        record, grad = self._records[param], param.grad
        record.is_touched, record.left_by_backward = True, None
        if grad is None or grad.requires_grad or grad.layout is not torch.strided:
            return  # the step will copy it, or refuse it
        view = record.view
        if view is not None and grad is not view.latest and view.takes(grad):
            param.grad = grad = view.latest
            self.copied_nbytes += view.array.nbytes
        sample = _sample_of(grad) if record.is_sampled else None
        record.left_by_backward = _Left(grad, grad._version, sample)
        if self._on_ready is not None:
            self._on_ready(param)


class _Left(NamedTuple):
    """A gradient as backward has left it.

    Attributes:
        grad: The gradient.
        version: Its version.
        sample: Some of its values, or None.
    """

    grad: Tensor
    version: int
    sample: Tensor | None


class _Record:
    """The hook on a parameter, and its findings.

    Args:
        hook: Removes it.

    Attributes:
        hook: As given.
        view: Where the gradient is to be; None for a parameter that has never had one.
        is_touched: Whether it counts as a gradient; see [Note: None unless touched].
        cleared: Its version when it was cleared.
        left_by_backward: The gradient as the last backward has left it; None if none has come, or
            it was looked at since.
        is_sampled: Whether a sample of it is taken then.
    """

    __slots__ = ("cleared", "hook", "is_sampled", "is_touched", "left_by_backward", "view")

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self.is_sampled = False
        self.reset(None)

    def reset(self, view: View | None, *, is_touched: bool = False) -> None:
        """Forget what backward has done so far."""
        self.view = view
        self.is_touched = is_touched
        self.cleared: object = None
        self.left_by_backward: _Left | None = None


def _sample_of(grad: Tensor) -> Tensor:
    """Return a copy of some values of a gradient."""
    flat = grad.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE_NUMEL)].clone()


def _others_average() -> bool:
    """Whether torch's own processes, such as DDP's, may average gradients in place, as they do."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _any_nonzero(array: FloatArray) -> bool:
    """Return whether any element is not zero; fast if many are."""
    flat = array.reshape(-1)
    return any(flat[i : i + _SCAN_NUMEL].any() for i in range(0, flat.size, _SCAN_NUMEL))
