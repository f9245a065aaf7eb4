"""The adapter of parameters that hold arrays of NumPy or CuPy."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from shardopt._typing import FloatArray
from shardopt.backends.base import address_of, is_on_device
from shardopt.backends.devices import HOST, current_queue
from shardopt.params.adapter import Adapter, ParamsListener, model_error
from shardopt.params.model import ModelContent
from shardopt.rule.hyperparams import Hyperparams


class _HoldsArrays(Protocol):
    data: Any
    grad: Any


A = TypeVar("A", bound=_HoldsArrays, contravariant=True)


class ArrayAdapter(Adapter[A]):
    """The adapter of parameters whose ``data`` and ``grad`` are NumPy arrays."""

    grads_from_start = False
    reports_grads = False
    reports_forward = False
    shows_averages = False
    widens_grads = False
    step_dtype = "float64"
    annotate = None
    copied_nbytes = 0
    _place = HOST

    def name(self, param: A) -> str | None:
        """Return None; see ``Adapter.name``."""
        return None

    def read_entry(self, entry: Mapping[str, Any], hyper: Hyperparams) -> Mapping[str, Any]:
        """Return the entry as it is."""
        return entry

    def device(self, param: A) -> str:
        """Return where the array is that the parameter holds."""
        self._place = _device_of(param.data)
        return self._place

    def current_queue(self) -> int:
        """Return CuPy's current one on the device."""
        return current_queue(self._place)

    def note_value(self, param: A) -> None:
        """Do nothing: arrays do not count writes."""

    def was_written(self, param: A) -> bool:
        """Return False; see ``note_value``."""
        return False

    def requires_grad(self, param: A) -> bool:
        """Return True; see ``Adapter.requires_grad``."""
        return True

    def keeps_full_state(self, param: A) -> bool:
        """Return False; see ``Adapter.keeps_full_state``."""
        return False

    def from_array(self, array: FloatArray, like: A | None) -> FloatArray:
        """Return the array itself."""
        return array

    def from_number(self, number: FloatArray) -> float:
        """Return a float."""
        return float(number)

    def view(self, param: A, array: FloatArray) -> FloatArray:
        """Return the array itself."""
        return array

    def bind_data(self, param: A, view: FloatArray) -> None:
        """See ``Adapter.bind_data``."""
        param.data = view

    def bind_grad(self, param: A, view: FloatArray) -> None:
        """See ``Adapter.bind_grad``."""
        param.grad = view

    def clear_grad(self, param: A, view: FloatArray) -> None:
        """Unbind the view: nobody could tell whether an array was written to."""
        param.grad = None

    def unbind_grad(self, param: A) -> None:
        """See ``Adapter.unbind_grad``."""
        param.grad = None

    def holds_data(self, param: A, view: FloatArray) -> bool:
        """See ``Adapter.holds_data``."""
        return _is_view(param.data, view)

    def holds_grad(self, param: A, view: FloatArray) -> bool:
        """See ``Adapter.holds_grad``."""
        return _is_view(param.grad, view)

    def is_clear(self, param: A, view: FloatArray) -> bool:
        """Return False: a cleared view is no longer bound."""
        return False

    def bump_version(self, params: Sequence[A]) -> None:
        """Do nothing: arrays have no version."""

    def on_grad_ready(self, listener: Callable[[Any], None]) -> None:
        """Do nothing: gradients are written at any time; see ``reports_grads``."""

    def on_params_needed(self, listener: ParamsListener | None) -> None:
        """Do nothing: parameters are read at any time; see ``reports_forward``."""

    def on_backward(self, listener: Callable[[], None] | None) -> None:
        """Do nothing; see ``on_grad_ready``."""

    def on_backward_ends(self, on_start: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Do nothing; see ``on_grad_ready``."""

    def on_fault(self, listener: Callable[[Exception], None]) -> None:
        """Do nothing: the step finds what is wrong."""

    def on_grad_read(self, listener: Callable[[], None]) -> None:
        """Do nothing: a bound gradient is this rank's own."""

    def note_averages(self, *, are_shown: bool) -> None:
        """Do nothing; see ``on_grad_read``."""

    def end_backward(self) -> None:
        """Do nothing; see ``on_grad_ready``."""

    def own_grad(self, param: A, view: FloatArray, *, zeros: bool) -> None:
        """See ``Adapter.own_grad``."""
        param.grad = np.zeros_like(view) if zeros else view.copy()

    def grad_factors(self) -> Mapping[int, tuple[Sequence[float], Sequence[float]]]:
        """Return none; see ``on_grad_read``."""
        return {}

    def forget_factors(self, param: A) -> None:
        """Do nothing; see ``on_grad_read``."""

    def grad_version(self, param: A) -> None:
        """Return None; see ``Adapter.grad_version``."""

    def were_grads_written(self, num_allowed: int) -> bool:
        """Return False: arrays do not count writes."""
        return False

    def detach(self, param: A) -> None:
        """Do nothing: nothing is attached."""

    def release(self, param: A) -> None:
        """See ``Adapter.release``."""
        param.grad = None

    def read_model(
        self, model: Any, params: Sequence[A], saved: Collection[str] | None
    ) -> ModelContent:
        """Refuse the model: there is no class of models for arrays alone."""
        raise model_error("None for an optimizer of arrays", model, "Save arrays in extra")

    def load_model(
        self, model: Any, params: Sequence[A], content: ModelContent, values: Mapping[str, Any]
    ) -> tuple[Any, Sequence[str]]:
        """Return the model, as there is nothing to load."""
        return model, []

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Accept any; see ``Adapter.check_group``."""


def _device_of(array: Any) -> str:
    """Return the device that an array is on: ``cpu``, or such as ``cuda:0``."""
    if not is_on_device(array):
        return HOST
    return f"cuda:{getattr(getattr(array, 'device', None), 'id', 0)}"


def _is_view(array: Any, view: FloatArray) -> bool:
    """Whether ``array`` is ``view``, or another view of the same elements in the same order."""
    if array is view:
        return True
    return (
        (isinstance(array, np.ndarray) or is_on_device(array))
        and array.dtype == view.dtype
        and array.shape == view.shape
        and getattr(array, "strides", None) == view.strides  # another library's may have none
        and (array.size == 0 or address_of(array) == address_of(view))
    )
