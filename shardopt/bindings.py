"""What ties a framework's parameters to the windows, and notices when somebody unties them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from shardopt.errors import PartitionError
from shardopt.kernels.base import FloatArray
from shardopt.nadam import Hyperparams

P = TypeVar("P", contravariant=True)


class Face(Protocol[P]):
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

    def listen(self, listener: Callable[[Any], None]) -> bool:
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


class ArrayFace(Face[A]):
    """The face of parameters whose ``data`` and ``grad`` are attributes that hold NumPy arrays."""

    grads_from_start = False

    def name(self, param: A) -> str | None:
        """None; see ``Face.name``."""
        return None

    def read_entry(self, entry: Mapping[str, Any], hyper: Hyperparams) -> Mapping[str, Any]:
        """The entry as it is."""
        return entry

    def view(self, param: A, array: FloatArray) -> FloatArray:
        """The array itself."""
        return array

    def bind_data(self, param: A, view: FloatArray) -> None:
        """See ``Face.bind_data``."""
        param.data = view

    def bind_grad(self, param: A, view: FloatArray) -> None:
        """See ``Face.bind_grad``."""
        param.grad = view

    def blank_grad(self, param: A, view: FloatArray) -> None:
        """Unbind the view: nobody could tell whether an array was written to."""
        param.grad = None

    def holds_data(self, param: A, view: FloatArray) -> bool:
        """See ``Face.holds_data``."""
        return _is_view(param.data, view)

    def holds_grad(self, param: A, view: FloatArray) -> bool:
        """See ``Face.holds_grad``."""
        return _is_view(param.grad, view)

    def is_blank(self, param: A, view: FloatArray) -> bool:
        """False: blanking unbinds."""
        return False

    def updated(self, params: Sequence[A]) -> None:
        """Nothing keeps count."""

    def listen(self, listener: Callable[[Any], None]) -> bool:
        """False: gradients are written at any time."""
        return False

    def grad_version(self, param: A) -> None:
        """None; see ``Face.grad_version``."""

    def release(self, param: A) -> None:
        """See ``Face.release``."""
        param.grad = None


class Binding:
    """One parameter and its views of the windows.

    Attributes:
        name: The parameter's name, for messages.
        param: The framework's object.
        data: This parameter in the node's window.
        grad: This rank's gradient of it.
    """

    __slots__ = ("_data_view", "_face", "_grad_view", "data", "grad", "name", "param")

    def __init__(
        self, name: str, param: Any, face: Face[Any], data: FloatArray, grad: FloatArray
    ) -> None:
        self.name = name
        self.param = param
        self.data = data
        self.grad = grad
        self._face = face
        self._data_view = face.view(param, data)
        self._grad_view = face.view(param, grad)

    def fill(self) -> None:
        """Copy the parameter's value into the window."""
        self.data[...] = self._face.data(self.param, self.name)

    def bind(self) -> None:
        """Make the parameter live in the windows; a gradient that it has is copied there."""
        grad = self._face.grad(self.param, self.name)
        self.bind_data()
        if grad is not None:
            self.write_grad(grad)
        elif self._face.grads_from_start:
            self.bind_grad()
        else:
            self.blank_grad()

    def bind_data(self) -> None:
        """Make the value live in the window."""
        self._face.bind_data(self.param, self._data_view)

    def bind_grad(self) -> None:
        """Make the gradient live in the window."""
        self._face.bind_grad(self.param, self._grad_view)

    def blank_grad(self) -> None:
        """Give the parameter no gradient; what is in the window must be zero."""
        self._face.blank_grad(self.param, self._grad_view)

    def holds_grad(self) -> bool:
        """Whether the gradient lives in the window."""
        return self._face.holds_grad(self.param, self._grad_view)

    def grad_version(self) -> object:
        """See ``Face.grad_version``."""
        return self._face.grad_version(self.param)

    def take_grad(self) -> int | None:
        """Bring the gradient into the window now.

        Returns:
            Bytes that had to be copied; None where there is none that fits.
        """
        if self.holds_grad():
            return 0
        try:
            array = self.find_new_grad()[1]
        except PartitionError:
            return None
        if array is None:
            return None
        self.write_grad(array)
        return array.nbytes

    def has_grad(self) -> bool:
        """Whether the parameter has a gradient, here or elsewhere."""
        if self._face.holds_grad(self.param, self._grad_view):
            return not self._face.is_blank(self.param, self._grad_view)
        return self._face.grad(self.param, self.name) is not None

    def release(self) -> None:
        """Give the parameter memory of its own again, with the same values, and no gradient.

        A value that has taken the view's place stays.
        """
        if self._face.holds_data(self.param, self._data_view):
            own = self._face.view(self.param, self.data.copy())
            self._face.bind_data(self.param, own)
        self._face.release(self.param)
        del self.data, self.grad, self._data_view, self._grad_view

    def find_new_data(self) -> FloatArray | None:
        """Give the array that has taken the place of the window's view, or None.

        Raises:
            PartitionError: It has another shape or dtype.
        """
        if self._face.holds_data(self.param, self._data_view):
            return None
        array = self._face.data(self.param, self.name)
        require_like("data", self.name, array, self.data)
        return array

    def find_new_grad(self) -> tuple[bool, FloatArray | None]:
        """Say whether there is a gradient, and give the array that has taken the view's place.

        Raises:
            PartitionError: It has another shape or dtype.
        """
        if self._face.holds_grad(self.param, self._grad_view):
            return not self._face.is_blank(self.param, self._grad_view), None
        array = self._face.grad(self.param, self.name)
        if array is not None:
            require_like("grad", self.name, array, self.grad)
        return array is not None, array

    def write_grad(self, array: FloatArray) -> None:
        """Copy a gradient into the window and bind it."""
        np.copyto(self.grad, array)
        self.bind_grad()

    def clear_grad(self) -> None:
        """Zero the gradient in the window: other ranks add what is there."""
        self.grad[...] = 0


def require_like(what: str, name: str, array: FloatArray, wanted: FloatArray) -> None:
    """Refuse a value or gradient of parameter ``name`` that does not fit.

    Raises:
        PartitionError: ``array`` has another shape or dtype than ``wanted``.
    """
    for attribute in ("shape", "dtype"):
        keep, got = getattr(wanted, attribute), getattr(array, attribute)
        if keep != got:
            raise PartitionError(
                f"{what} of parameter {name!r} must keep {attribute} {keep}; got {got}. "
                "Convert it back, or build a new optimizer for the changed model."
            )


def require_disjoint(names: Sequence[str], arrays: Sequence[FloatArray]) -> None:
    """Refuse parameters that share memory: an update of one would change the other unseen.

    Raises:
        PartitionError: Two arrays overlap; the message names both.
    """
    bounds = sorted((*_byte_bounds(array), i) for i, array in enumerate(arrays) if array.size)
    near: list[tuple[int, int]] = []  # (stop, index) of those that reach past the present start
    for start, stop, i in bounds:
        near = [(reach, j) for reach, j in near if reach > start]
        for _, j in near:
            if _overlap(arrays[i], arrays[j]):
                first, second = sorted((i, j))
                raise PartitionError(
                    f"parameters must not share memory; got {names[first]!r} and "
                    f"{names[second]!r} overlapping. Pass a shared array once, or copy one of them."
                )
        near.append((stop, i))


def _byte_bounds(array: FloatArray) -> tuple[int, int]:
    low, high = np.lib.array_utils.byte_bounds(array)
    return int(low), int(high)


def _overlap(left: FloatArray, right: FloatArray) -> bool:
    try:
        return np.shares_memory(left, right, max_work=100_000)  # type: ignore[arg-type]  # stub
    except np.exceptions.TooHardError:
        return True


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


def read_before_write(
    arrays: Mapping[int, FloatArray], windows: Sequence[FloatArray]
) -> dict[int, FloatArray]:
    """Copy those arrays that show a window, so that none changes while windows are written."""
    return {
        index: array.copy() if any(np.may_share_memory(array, w) for w in windows) else array
        for index, array in arrays.items()
    }
