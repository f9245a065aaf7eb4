"""Gradients of PyTorch that the ranks of a node average as backward goes."""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardopt.errors import CallOrderError, StageWarning
from shardopt.report import tell
from shardopt.torch.adapter import _TorchAdapter
from shardopt.torch.average_grad import AverageGrad, Factors
from shardopt.torch.reducers import watch_wrappers, wrapped_params

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from shardopt._typing import FloatArray
    from shardopt.params.adapter import Adapter
    from shardopt.torch.forward import ForwardHooks
    from shardopt.torch.views import View

_NOT_SHOWN = (
    "p.grad must not be used with policy.stage=2 on several nodes, where it stands for a gradient "
    "that no rank has as a whole, before opt.average_grads() on all ranks has made it the average "
    "over all ranks; to clip, max_grad_norm needs no such call."
)

_COMPILED = (
    "policy.stage must be 1 with compiled autograd, whose graph cannot hold what averages "
    "gradients; got 2. Leave it out, and update_in_backward, too: stage 1 works there. Or compile "
    "the model alone, by torch.compile(model) without torch._dynamo.config.compiled_autograd."
)

_REAL_DTYPES = frozenset((torch.float32, torch.float64))


class _Shown:
    """Whether averages can be used; it outlives the optimizer."""

    def __init__(self) -> None:
        self.are_shown = True


class _AveragingAdapter(_TorchAdapter):
    """The adapter of stage 2; see ``Adapter``.

    [Note: gradients taken from autograd]
    A hook in front of ``AccumulateGrad`` takes the average of earlier backwards off ``p.grad``, so
    that autograd puts the new gradient there without a copy. The last of the parameter's
    post-accumulate hooks hands it over, and puts the average back; if users have registered hooks
    behind ours, this happens before the next parameter instead, or at the end of backward. A
    gradient with a graph of its own (``create_graph``) stays where it is: it is this rank's own, as
    one that a user has put there, and the step averages it.

    So do gradients of parameters that DistributedDataParallel wraps, now or later. Its reducer
    reads and writes ``p.grad`` behind all hooks and at the end of backward, where the average
    would be by then; the step averages what it has left there, as in stage 1.

    A parameter of 16 bits has an average in float32, for which torch must take any dtype in
    ``p.grad`` (``grad_dtype``). Autograd computes gradients in 16 bits as ever.
    """

    shows_averages = True
    widens_grads = hasattr(Tensor, "grad_dtype")

    def __init__(
        self,
        names: Mapping[Tensor, str],
        comm_size: int,
        with_full_state: Collection[Tensor],
        forward_hooks: ForwardHooks | None,
    ) -> None:
        super().__init__(names, comm_size, with_full_state, forward_hooks)
        self._on_start: Callable[[], None] | None = None
        self._on_end: Callable[[], None] | None = None
        self._read: Callable[[], None] | None = None
        self._shown, self._were_shown = _Shown(), True  # averages, and before this backward
        self._averages: dict[Tensor, AverageGrad] = {}
        self._factors: dict[int, Factors] = {}  # on averages, by the id of the parameter
        self._fronts: dict[Tensor, tuple[Any, Any]] = {}  # AccumulateGrad, and our hook on it
        self._wrapped: Collection[int] = ()  # parameters of a reducer, in the present backward
        self._has_warned = False
        self._is_in_flight = self._was_in_flight = False  # averages, before this backward, too
        self._widened: set[Tensor] = set()  # parameters that take gradients of any dtype
        self._tasks: dict[int, weakref.ref[Any]] = {}  # backwards that have not ended
        self._deferred: list[Tensor] = []
        watch_wrappers()

    def on_backward_ends(self, on_start: Callable[[], None], on_end: Callable[[], None]) -> None:
        self._on_start, self._on_end = on_start, on_end

    def on_grad_read(self, listener: Callable[[], None]) -> None:
        self._read = listener

    def note_averages(self, *, are_shown: bool) -> None:
        self._shown.are_shown = are_shown

    def grad(self, param: Tensor, name: str) -> FloatArray | None:
        grad = param.grad
        if type(grad) is Tensor and grad.dtype in _REAL_DTYPES:
            with contextlib.suppress(RuntimeError, TypeError):  # as for all that is not plain
                array: FloatArray = grad.numpy()  # in hooks every call counts
                return array
        if isinstance(grad, AverageGrad):
            grad._read()
        return super().grad(param, name)

    def bind_grad(self, param: Tensor, view: View) -> None:
        if param not in self._fronts:
            self._watch(param)
        average = self._averages.get(param)
        if average is None:
            values, wait = view.tensor(), self._weak_wait()
            average = AverageGrad.over(values, wait, self._factors, id(param))
            self._averages[param] = average
        self._factors.pop(id(param), None)
        param.grad = average

    def clear_grad(self, param: Tensor, view: View) -> None:
        self._watch(param)  # its gradient, if it has one, is this rank's own

    def unbind_grad(self, param: Tensor) -> None:
        param.grad = None

    def holds_grad(self, param: Tensor, view: View) -> bool:
        return self._is_average(param)

    def grad_factors(self) -> Mapping[int, tuple[Sequence[float], Sequence[float]]]:
        return self._factors

    def forget_factors(self, param: Tensor) -> None:
        self._factors.pop(id(param), None)

    def own_grad(self, param: Tensor, view: View, *, zeros: bool) -> None:
        factors, values = self._factors.pop(id(param), None), view.tensor()
        values = torch.zeros_like(values) if zeros else values.clone()
        for factor in () if zeros or factors is None else factors.pending:
            values.mul_(factor)
        param.grad = values.to(param.dtype)

    def is_clear(self, param: Tensor, view: View) -> bool:
        return False

    def were_grads_written(self, num_allowed: int) -> bool:
        return False  # writes are found, and averages may be written to

    def detach(self, param: Tensor) -> None:
        self._averages.pop(param, None)
        self._factors.pop(id(param), None)
        if front := self._fronts.pop(param, None):
            front[1].remove()
        if param in self._widened:
            self._widened.remove(param)
            if param.grad is not None:
                param.grad = param.grad.to(param.dtype)
            param.grad_dtype = param.dtype
        super().detach(param)

    def end_backward(self) -> None:
        self._is_in_flight = False  # whoever calls waits for averages next, or forgets them
        if torch._C._current_graph_task_id() == -1 and (self._tasks or self._deferred):
            self._tasks.clear()
            self._end()

    def _watch(self, param: Any) -> Any:
        record = super()._watch(param)
        if self.widens_grads and param.dtype.itemsize == 2 and param.grad_dtype is not None:
            param.grad_dtype = None
            self._widened.add(param)
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
        if self._is_average(param):
            param.grad = self._own(param) if id(param) in self._wrapped else None

    def _own(self, param: Tensor) -> Tensor:
        """Return a copy of an average, for a reducer to add to.

        Raises:
            CallOrderError: Other ranks may not have added to it yet, or this one does not have it.
        """
        if self._was_in_flight:
            raise CallOrderError(
                "p.grad must be None before the backward of a module in DistributedDataParallel; "
                "got an average of ShardPolicy(stage=2) of the backward before. Call zero_grad() "
                "on all ranks in between."
            )
        if not self._were_shown:
            raise CallOrderError(
                "p.grad must be None before the backward of a module in DistributedDataParallel, "
                "or a tensor; got what stands for an average of ShardPolicy(stage=2) on several "
                "nodes, of which no rank has the whole. Call zero_grad() on all ranks in between, "
                "or opt.average_grads() before."
            )
        with torch._C.DisableTorchFunctionSubclass():
            values = self._averages[param].as_subclass(Tensor).clone()
        factors = self._factors.pop(id(param), None)
        for factor in () if factors is None else factors.pending:
            values.mul_(factor)
        return values.to(param.dtype)

    def _begin(self, task: int) -> None:
        compiler: Any = sys.modules.get("torch._dynamo.compiled_autograd")
        if compiler is not None and compiler.in_compiled_autograd_region:
            raise CallOrderError(_COMPILED)
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
        if is_outermost:
            self._were_shown = self._shown.are_shown
        self._tasks[task] = weakref.ref(end)
        if is_outermost and self._on_start is not None:
            self._on_start()
        if is_outermost:
            self._was_in_flight = self._is_in_flight
            self._find_wrapped()

    def _find_wrapped(self) -> None:
        """Find the parameters whose gradients a reducer averages in this backward."""
        self._wrapped = wrapped_params()
        has_some = any(id(param) in self._wrapped for param in self._records if self._wrapped)
        if has_some and not self._has_warned:
            self._has_warned = True
            text = (
                "policy.stage=2 does what stage 1 does for the parameters of "
                "DistributedDataParallel, which averages their gradients itself and needs them on "
                "each rank. Train the module inside to save that memory. This is said once."
            )
            has_ranks = torch.distributed.is_initialized()
            tell(StageWarning(text), aloud=not has_ranks or torch.distributed.get_rank() == 0)

    def _is_average(self, param: Tensor) -> bool:
        return param.grad is not None and param.grad is self._averages.get(param)

    def _live_tasks(self) -> dict[int, weakref.ref[Any]]:
        """Return the backwards that have not raised: the engine drops the callbacks of those."""
        return {task: end for task, end in self._tasks.items() if end() is not None}

    def _end(self) -> None:
        self._hand_over_deferred()
        if self._on_end is not None:
            self._on_end()

    def _accumulated(self, param: Tensor) -> None:
        if self._forward_hooks is not None:
            self._forward_hooks.reach(param)
        if self._deferred:
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
        if id(param) in self._wrapped:
            return
        if grad.dtype != param.dtype and not self._is_average(param):
            param.grad = grad.to(param.dtype)  # as torch does if it is not to take any dtype
        if self._on_ready is not None and grad is not self._averages.get(param):
            self._is_in_flight = True
            self._on_ready(param)

    def _weak_wait(self) -> Callable[[], None]:
        """Return what waits as long as there is an optimizer: ``p.grad`` must not keep it."""
        adapter, shown = weakref.ref(self), self._shown

        def wait() -> None:
            if not shown.are_shown:
                raise CallOrderError(_NOT_SHOWN)
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


def make_adapter(
    names: Mapping[Tensor, str],
    comm_size: int,
    with_full_state: Collection[Tensor] = (),
    *,
    stage: int,
    in_backward: bool = False,
    forward_hooks: ForwardHooks | None = None,
) -> Adapter[Tensor]:
    """Return a new adapter; each optimizer needs its own.

    Args:
        names: The names of parameters, as far as they are known from where they came from.
        comm_size: Number of ranks that train together.
        with_full_state: Parameters whose moments keep all their bits.
        stage: As in ``ShardPolicy``.
        in_backward: As ``update_in_backward`` there.
        forward_hooks: Report what forward passes of the model need, if its policy asks for it.
    """
    if in_backward:
        from shardopt.torch.updates import _UpdatingAdapter  # it is made of what is here

        return _UpdatingAdapter(names, comm_size, with_full_state, forward_hooks)
    kind = _AveragingAdapter if stage == 2 else _TorchAdapter
    return kind(names, comm_size, with_full_state, forward_hooks)
