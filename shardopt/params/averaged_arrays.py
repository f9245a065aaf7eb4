"""Averages in the place of gradients that are arrays: stage 2 without hooks on backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from shardopt.errors import CallOrderError
from shardopt.params.array_adapter import A, ArrayAdapter

if TYPE_CHECKING:
    from shardopt._typing import FloatArray

_HIDDEN = (
    "p.grad must not be used after a step with policy.stage=2 on several nodes, where it stands "
    "for an average of which no rank has the whole; got a use of it. Call zero_grad() before the "
    "next backward, and average_grads() on all ranks to look at averages before the step."
)


class _Hidden(NDArrayOperatorsMixin):
    """Stands for an average that is not there: what looks at its elements raises."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise CallOrderError(_HIDDEN)

    __array__ = __array_ufunc__ = __array_function__ = _refuse
    __getitem__ = __setitem__ = __len__ = __iter__ = __float__ = __bool__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # asked for by those who only want to know what it is
            raise AttributeError(name)
        raise CallOrderError(_HIDDEN)

    def __repr__(self) -> str:
        return "<an average that no rank has as a whole>"


class AveragedArrays(ArrayAdapter[A]):
    """The adapter of stage 2 for parameters whose gradients are arrays; see ``Adapter``.

    The framework or the user puts a gradient of this rank's own there. The next step, or
    ``average_grads``, hands all of them to the ring, from the last parameter to the first, and puts
    the averages in their place; see [Note: what p.grad is in stage 2].
    """

    shows_averages = True
    widens_grads = True

    def __init__(self) -> None:
        self._are_shown = True
        self._bound: dict[int, tuple[A, FloatArray, _Hidden]] = {}  # by the parameter's id

    def grad(self, param: A, name: str) -> FloatArray | None:
        """See ``Adapter.grad``; an average may be wider than what the framework has there."""
        if isinstance(param.grad, _Hidden):
            raise CallOrderError(_HIDDEN)
        bound = self._bound.get(id(param))
        if bound is not None and self.holds_grad(param, bound[1]):
            return bound[1]
        own: FloatArray | None = super().grad(param, name)  # type: ignore[safe-super]
        return own

    def note_averages(self, *, are_shown: bool) -> None:
        """See ``Adapter.note_averages``."""
        if are_shown == self._are_shown:
            return
        held = [each for each in self._bound.values() if self.holds_grad(*each[:2])]
        self._are_shown = are_shown
        for param, view, _ in held:
            self.bind_grad(param, view)

    def bind_grad(self, param: A, view: FloatArray) -> None:
        """See ``Adapter.bind_grad``."""
        bound = self._bound.get(id(param))
        if bound is None or bound[1] is not view:
            bound = self._bound[id(param)] = param, view, _Hidden()
        param.grad = view if self._are_shown else bound[2]

    def clear_grad(self, param: A, view: FloatArray) -> None:
        """Leave what is there if it is this rank's own."""
        if self.holds_grad(param, view):
            param.grad = None

    def holds_grad(self, param: A, view: FloatArray) -> bool:
        """See ``Adapter.holds_grad``."""
        if isinstance(param.grad, _Hidden):
            bound = self._bound.get(id(param))
            return bound is not None and param.grad is bound[2]
        if view.size == 0:  # any two arrays without elements look like views of each other
            return param.grad is view
        return super().holds_grad(param, view)

    def own_grad(self, param: A, view: FloatArray, *, zeros: bool) -> None:
        """See ``Adapter.own_grad``; it has the dtype of the parameter."""
        values = np.zeros_like(view) if zeros else view.copy()
        param.grad = values.astype(self.data(param, "with an average").dtype, copy=False)

    def detach(self, param: A) -> None:
        """Forget its average."""
        self._bound.pop(id(param), None)
        super().detach(param)

    def release(self, param: A) -> None:
        """See ``Adapter.release``."""
        self.detach(param)
        super().release(param)
