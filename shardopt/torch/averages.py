"""Gradients of PyTorch that the ranks of a node average as backward goes."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from shardopt.errors import CallOrderError, HyperparamsError
from shardopt.torch.adapter import _TorchAdapter, _View

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from shardopt.params.adapter import Adapter

_ABOUT = ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "grad")
_UNREAD = {getattr(Tensor, name).__get__ for name in _ABOUT} | {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous),
    *(Tensor.is_complex, Tensor.is_floating_point, Tensor.element_size),
}
"""What can be asked of a tensor without a look at its elements."""


class AverageGrad(Tensor):
    """The average of a gradient over all ranks, as ``p.grad``.

    It waits for ranks that are behind when its elements are first used after a backward. What
    torch makes of it is an ordinary tensor, except that ``p.grad *= 2`` leaves it in ``p.grad``.
    """

    _read: Callable[[], None]

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with ordinary tensors in the place of averages."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _UNREAD:
                return func(*args, **(kwargs or {}))
            plain = [_ordinary(arg) for arg in args]
            named = {name: _ordinary(value) for name, value in (kwargs or {}).items()}
            result = func(*plain, **named)
        return args[0] if plain and result is plain[0] else result


def _ordinary(value: Any) -> Any:
    """Return an argument with ordinary tensors in the place of averages, which are waited for."""
    if isinstance(value, AverageGrad):
        value._read()
        return value.as_subclass(Tensor)
    if isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value):
        return type(value)(map(_ordinary, value))
    return value


class _AveragingAdapter(_TorchAdapter):
    """The adapter of stage 2; see ``Adapter``.

    [Note: gradients taken from autograd]
    A hook in front of ``AccumulateGrad`` takes the average of earlier backwards off ``p.grad``, so
    that autograd puts the new gradient there without a copy. The last of the parameter's
    post-accumulate hooks hands it over, and puts the average back; if users have registered hooks
    behind ours, this happens before the next parameter instead, or at the end of backward. A
    gradient with a graph of its own (``create_graph``) stays where it is: it is this rank's own, as
    one that a user has put there, and the step averages it.
    """

    shows_averages = True

    def __init__(
        self, names: Mapping[Tensor, str], comm_size: int, with_full_state: Collection[Tensor]
    ) -> None:
        super().__init__(names, comm_size, with_full_state)
        self._on_start: Callable[[], None] | None = None
        self._on_end: Callable[[], None] | None = None
        self._read: Callable[[], None] | None = None
        self._averages: dict[Tensor, AverageGrad] = {}
        self._fronts: dict[Tensor, tuple[Any, Any]] = {}  # AccumulateGrad, and our hook on it
        self._is_checked = False  # again at the first backward
        self._tasks: dict[int, weakref.ref[Any]] = {}  # backwards that have not ended
        self._deferred: list[Tensor] = []

    def on_backward_ends(self, on_start: Callable[[], None], on_end: Callable[[], None]) -> None:
        self._on_start, self._on_end = on_start, on_end

    def on_grad_read(self, listener: Callable[[], None]) -> None:
        self._read = listener

    def bind_grad(self, param: Tensor, view: _View) -> None:
        self._watch(param)
        average = self._averages.get(param)
        if average is None:
            average = self._averages[param] = view.tensor().as_subclass(AverageGrad)
            average._read = self._weak_wait()
        param.grad = average

    def clear_grad(self, param: Tensor, view: _View) -> None:
        self._watch(param)  # its gradient, if it has one, is this rank's own

    def unbind_grad(self, param: Tensor) -> None:
        param.grad = None

    def holds_grad(self, param: Tensor, view: _View) -> bool:
        return param.grad is not None and param.grad is self._averages.get(param)

    def is_clear(self, param: Tensor, view: _View) -> bool:
        return False

    def were_grads_written(self, num_allowed: int) -> bool:
        return False  # writes are found, and averages may be written to

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        _require_no_reducer(group["params"])

    def detach(self, param: Tensor) -> None:
        self._averages.pop(param, None)
        if front := self._fronts.pop(param, None):
            front[1].remove()
        super().detach(param)

    def end_backward(self) -> None:
        if torch._C._current_graph_task_id() == -1 and (self._tasks or self._deferred):
            self._tasks.clear()
            self._end()

    def _watch(self, param: Any) -> Any:
        record = super()._watch(param)
        if param not in self._fronts and param.requires_grad:
            with torch.enable_grad():
                node = torch.autograd.graph.get_gradient_edge(param).node
            adapter, of = weakref.ref(self), param

            def prepare(_: Any) -> None:
                if (alive := adapter()) is not None:
                    alive._prepare(of)

            self._fronts[param] = node, node.register_prehook(prepare)
        return record

    def _prepare(self, param: Tensor) -> None:
        """Get ready for the gradient that backward is about to accumulate."""
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._begin(task)
        if param.grad is not None and param.grad is self._averages.get(param):
            param.grad = None

    def _begin(self, task: int) -> None:
        if not self._is_checked:
            _require_no_reducer(self._records)
            self._is_checked = True
        if self._tasks and not self._live_tasks():
            self._tasks.clear()
            self._end()  # of a backward that has raised
        adapter = weakref.ref(self)

        def end() -> None:
            if (alive := adapter()) is not None and task in alive._tasks:
                del alive._tasks[task]
                alive._tasks = alive._live_tasks()
                if not alive._tasks:
                    alive._end()

        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(end)
        is_outermost = not self._tasks
        self._tasks[task] = weakref.ref(end)
        if is_outermost and self._on_start is not None:
            self._on_start()

    def _live_tasks(self) -> dict[int, weakref.ref[Any]]:
        """Return the backwards that have not raised: the engine drops the callbacks of those."""
        return {task: end for task, end in self._tasks.items() if end() is not None}

    def _end(self) -> None:
        self._hand_over_deferred()
        if self._on_end is not None:
            self._on_end()

    def _accumulated(self, param: Tensor) -> None:
        self._hand_over_deferred()
        hooks: Any = param._post_accumulate_grad_hooks
        if next(reversed(hooks)) == self._records[param].hook.id:
            self._hand_over(param)
        else:
            self._deferred.append(param)

    def _hand_over_deferred(self) -> None:
        deferred, self._deferred = self._deferred, []
        for param in deferred:
            self._hand_over(param)

    def _hand_over(self, param: Tensor) -> None:
        """Have the ring take a gradient, which is replaced by the average."""
        grad = param.grad
        if grad is None or grad.requires_grad or grad.layout is not torch.strided:
            return  # the step takes it, or refuses it
        if self._on_ready is not None and grad is not self._averages.get(param):
            self._on_ready(param)

    def _weak_wait(self) -> Callable[[], None]:
        """Return what waits as long as there is an optimizer: ``p.grad`` must not keep it."""
        adapter = weakref.ref(self)

        def wait() -> None:
            if (alive := adapter()) is not None:
                alive._wait()

        return wait

    def _wait(self) -> None:
        if torch._C._current_graph_task_id() != -1:
            raise CallOrderError(
                "averaged gradients must be read after backward; got a hook that reads them in "
                "one. Read the gradient that the hook is given, or use ShardPolicy(stage=1)."
            )
        self.end_backward()
        if self._read is not None:
            self._read()


def _require_no_reducer(params: Collection[Tensor]) -> None:
    """Refuse parameters whose gradients DistributedDataParallel averages.

    Its reducer reads ``p.grad`` behind all hooks, where the average of other ranks is by then.

    Raises:
        HyperparamsError: A module of that kind has one of them.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    known = {id(param) for param in params}
    for module in gc.get_objects():
        if type(module) is DistributedDataParallel and any(
            id(param) in known for param in module.parameters()
        ):
            raise HyperparamsError(
                "policy.stage must be 1 for parameters of DistributedDataParallel; got 2. Leave it "
                "out, or train the module inside: stage 2 averages gradients itself."
            )


def make_adapter(
    names: Mapping[Tensor, str],
    comm_size: int,
    with_full_state: Collection[Tensor] = (),
    *,
    stage: int,
) -> Adapter[Tensor]:
    """Return a new adapter; each optimizer needs its own.

    Args:
        names: The names of parameters, as far as they are known from where they came from.
        comm_size: Number of ranks that train together.
        with_full_state: Parameters whose moments keep all their bits.
        stage: As in ``ShardPolicy``.
    """
    kind = _AveragingAdapter if stage == 2 else _TorchAdapter
    return kind(names, comm_size, with_full_state)
