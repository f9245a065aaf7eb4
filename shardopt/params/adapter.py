"""How the core reads and binds a framework's parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from shardopt._typing import FloatArray
from shardopt.rule.nadam import Hyperparams

P = TypeVar("P", contravariant=True)


class Adapter(Protocol[P]):
    """How the core reads and rebinds a framework's parameters; each framework has one.

    Arrays that ``data`` and ``grad`` return share memory with what the parameter holds, where its
    framework allows. A *view* is the framework's own object over memory of the windows.

    Attributes:
        grads_from_start: A parameter has a gradient of zeros from the start, to be added to; else
            it has none until its framework or its user gives it one.
    """

    grads_from_start: bool

    def name(self, param: P) -> str | None:
        """The parameter's own name, or None."""
        ...

    def data(self, param: P, name: str) -> FloatArray:
        """Its value; ``name`` is for messages.

        Raises:
            PartitionError: It cannot be had as a dense floating-point array in this machine's
                memory.
        """
        ...

    def grad(self, param: P, name: str) -> FloatArray | None:
        """Its gradient, or None.

        Raises:
            PartitionError: It cannot be had as such an array.
        """
        ...

    def read_entry(self, entry: Mapping[str, Any], hyper: Hyperparams) -> Mapping[str, Any]:
        """Give a parameter's entry in a state dict, maybe the framework's own, as torch has it.

        Moments must be arrays, of real numbers in the form that ``data`` gives.
        """
        ...

    def view(self, param: P, array: FloatArray) -> Any:
        """What ``param`` is to hold instead of ``array``, which has the form ``data`` gives."""
        ...

    def bind_data(self, param: P, view: Any) -> None:
        """Make a view the value."""
        ...

    def bind_grad(self, param: P, view: Any) -> None:
        """Make a view the gradient."""
        ...

    def blank_grad(self, param: P, view: Any) -> None:
        """Make it a parameter without a gradient.

        The view, which holds zeros, may stay bound if the face notices when it is written to.
        """
        ...

    def holds_data(self, param: P, view: Any) -> bool:
        """Whether the value is still the view."""
        ...

    def holds_grad(self, param: P, view: Any) -> bool:
        """Whether the gradient is still the view."""
        ...

    def is_blank(self, param: P, view: Any) -> bool:
        """Whether a view that is bound has been blanked and not been written to since."""
        ...

    def updated(self, params: Sequence[P]) -> None:
        """Take note that a step has changed the values of some parameters."""
        ...

    def on_grad_ready(self, listener: Callable[[Any], None]) -> bool:
        """Call ``listener`` with a parameter whenever backward has added to its gradient.

        Returns:
            Whether the framework tells when it does.
        """
        ...

    def grad_version(self, param: P) -> object:
        """Something that changes when the gradient is written to, as far as the framework knows."""
        ...

    def release(self, param: P) -> None:
        """Leave the parameter without a gradient and without anything the face attached to it."""
        ...


class _HoldsArrays(Protocol):
    data: Any
    grad: Any


A = TypeVar("A", bound=_HoldsArrays, contravariant=True)


class ArrayAdapter(Adapter[A]):
    """The face of parameters whose ``data`` and ``grad`` are attributes that hold NumPy arrays."""

    grads_from_start = False

    def name(self, param: A) -> str | None:
        """None; see ``Adapter.name``."""
        return None

    def read_entry(self, entry: Mapping[str, Any], hyper: Hyperparams) -> Mapping[str, Any]:
        """The entry as it is."""
        return entry

    def view(self, param: A, array: FloatArray) -> FloatArray:
        """The array itself."""
        return array

    def bind_data(self, param: A, view: FloatArray) -> None:
        """See ``Adapter.bind_data``."""
        param.data = view

    def bind_grad(self, param: A, view: FloatArray) -> None:
        """See ``Adapter.bind_grad``."""
        param.grad = view

    def blank_grad(self, param: A, view: FloatArray) -> None:
        """Unbind the view: nobody could tell whether an array was written to."""
        param.grad = None

    def holds_data(self, param: A, view: FloatArray) -> bool:
        """See ``Adapter.holds_data``."""
        return _is_view(param.data, view)

    def holds_grad(self, param: A, view: FloatArray) -> bool:
        """See ``Adapter.holds_grad``."""
        return _is_view(param.grad, view)

    def is_blank(self, param: A, view: FloatArray) -> bool:
        """False: blanking unbinds."""
        return False

    def updated(self, params: Sequence[A]) -> None:
        """Nothing keeps count."""

    def on_grad_ready(self, listener: Callable[[Any], None]) -> bool:
        """False: gradients are written at any time."""
        return False

    def grad_version(self, param: A) -> None:
        """None; see ``Adapter.grad_version``."""

    def release(self, param: A) -> None:
        """See ``Adapter.release``."""
        param.grad = None


def _is_view(array: Any, view: FloatArray) -> bool:
    """Whether ``array`` is ``view``, or another view of the same elements in the same order."""
    if array is view:
        return True
    return (
        isinstance(array, np.ndarray)
        and array.dtype == view.dtype
        and array.shape == view.shape
        and array.strides == view.strides
        and (array.size == 0 or array.ctypes.data == view.ctypes.data)
    )
