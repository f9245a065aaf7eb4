"""What ties a framework's parameters to the windows, and notices when somebody unties them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from shardopt.errors import PartitionError
from shardopt.kernels.base import FloatArray

P = TypeVar("P", contravariant=True)


class Face(Protocol[P]):
    """How the core reads and rebinds a framework's parameters; each framework has one.

    Arrays that ``data`` and ``grad`` return share memory with what the parameter holds. ``bind_*``
    make the parameter hold the given array itself.
    """

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

    def bind_data(self, param: P, array: FloatArray) -> None:
        """Make ``array`` the value."""
        ...

    def bind_grad(self, param: P, array: FloatArray | None) -> None:
        """Make ``array`` the gradient."""
        ...


class Binding:
    """One parameter and its views of the windows.

    Attributes:
        name: The parameter's name, for messages.
        param: The framework's object.
        data: This parameter in the node's window.
        grad: This rank's gradient of it.
    """

    __slots__ = ("_face", "data", "grad", "name", "param")

    def __init__(
        self, name: str, param: Any, face: Face[Any], data: FloatArray, grad: FloatArray
    ) -> None:
        self.name = name
        self.param = param
        self.data = data
        self.grad = grad
        self._face = face

    def fill(self) -> None:
        """Copy the parameter's value into the window."""
        self.data[...] = self._face.data(self.param, self.name)

    def bind(self) -> None:
        """Make the parameter live in the windows."""
        self._face.bind_data(self.param, self.data)
        self.bind_grad()

    def bind_grad(self) -> None:
        """Make the gradient live in the window."""
        self._face.bind_grad(self.param, self.grad)

    def drop_grad(self) -> None:
        """Give the parameter no gradient."""
        self._face.bind_grad(self.param, None)

    def release(self) -> None:
        """Give the parameter memory of its own again, with the same values, and no gradient.

        A value that has taken the view's place stays.
        """
        if _same_memory(self._face.data(self.param, self.name), self.data):
            self._face.bind_data(self.param, self.data.copy())
            self._face.bind_grad(self.param, None)
        del self.data, self.grad

    def find_new_data(self) -> FloatArray | None:
        """Give the array that has taken the place of the window's view, or None.

        Raises:
            PartitionError: It has another shape or dtype.
        """
        array = self._face.data(self.param, self.name)
        if array is self.data or _same_memory(array, self.data):
            return None
        self._require_like(array, self.data, "data")
        return array

    def find_new_grad(self) -> tuple[bool, FloatArray | None]:
        """Say whether there is a gradient, and give the array that has taken the view's place.

        Raises:
            PartitionError: It has another shape or dtype.
        """
        array = self._face.grad(self.param, self.name)
        if array is self.grad or (array is not None and _same_memory(array, self.grad)):
            return True, None
        if array is not None:
            self._require_like(array, self.grad, "grad")
        return array is not None, array

    def write_grad(self, array: FloatArray) -> None:
        """Copy a gradient into the window and bind it."""
        np.copyto(self.grad, array)
        self.bind_grad()

    def clear_grad(self) -> None:
        """Zero the gradient in the window: other ranks add what is there."""
        self.grad[...] = 0

    def _require_like(self, array: FloatArray, view: FloatArray, what: str) -> None:
        for attribute in ("shape", "dtype"):
            wanted, got = getattr(view, attribute), getattr(array, attribute)
            if wanted != got:
                raise PartitionError(
                    f"{what} of parameter {self.name!r} must keep {attribute} {wanted}; got {got}. "
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


def _same_memory(left: FloatArray, right: FloatArray) -> bool:
    """Whether two arrays are views of the same elements in the same order."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.strides == right.strides
        and (left.size == 0 or left.ctypes.data == right.ctypes.data)
    )


def read_before_write(
    arrays: Mapping[int, FloatArray], windows: Sequence[FloatArray]
) -> dict[int, FloatArray]:
    """Copy those arrays that show a window, so that none changes while windows are written."""
    return {
        index: array.copy() if any(np.may_share_memory(array, w) for w in windows) else array
        for index, array in arrays.items()
    }
