"""One parameter and the shared memory it lives in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend, is_on_device
from shardopt.errors import PartitionError
from shardopt.params.adapter import Adapter


class Binding:
    """One parameter and its views of shared memory.

    Attributes:
        name: The parameter's name, for messages.
        own_name: The same if it was given; None if it is made from its position.
        param: The framework's object.
        is_live: Whether its gradient has ever been in use. The memory of one that has not, such as
            that of a frozen parameter, is zero and has never been touched: it costs nothing.
        data: The node's copy of the parameter.
        own_data: The same as this rank may write to it, which the parameter itself is a view of;
            see [Note: weights that behave as in DDP].
        grad: This rank's gradient of it; or the average, which is wider if the parameter has 16
            bits.
    """

    __slots__ = (
        "_adapter",
        "_data_view",
        "_grad_view",
        "_holder",
        "data",
        "grad",
        "is_live",
        "name",
        "own_data",
        "own_name",
        "param",
    )

    def __init__(
        self,
        name: str,
        param: Any,
        framework: tuple[Adapter[Any], Backend],
        arrays: tuple[FloatArray, ...],
    ) -> None:
        self.name = name
        self.own_name: str | None = None
        self.param = param
        self.is_live = False
        self.data, self.own_data, self.grad = arrays
        adapter, self._holder = framework
        self._adapter = adapter
        self._data_view = adapter.view(param, self.own_data)
        self._grad_view = adapter.view(param, self.grad)

    def fill(self) -> None:
        """Copy the parameter's value into shared memory."""
        self._holder.copy(self.data, self._adapter.data(self.param, self.name))

    def bind(self, *, none_is_zero: bool) -> None:
        """Make the parameter live in shared memory, and copy its gradient there if it has one.

        Args:
            none_is_zero: Whether one without a gradient gets zeros, if its framework has gradients
                from the start.
        """
        grad = self._adapter.grad(self.param, self.name)
        self.bind_data()
        if grad is not None and not self._adapter.shows_averages:
            self.write_grad(grad)
        elif none_is_zero and self._adapter.grads_from_start:
            self.bind_grad()
        else:
            self.clear_grad()

    def bind_data(self) -> None:
        """Make the value live in shared memory."""
        self._adapter.bind_data(self.param, self._data_view)

    def bind_grad(self) -> None:
        """Make the gradient live in shared memory."""
        self.is_live = True
        self._adapter.bind_grad(self.param, self._grad_view)

    def clear_grad(self) -> None:
        """Leave the parameter without a gradient; shared memory must hold zeros."""
        if self.is_live or self._adapter.requires_grad(self.param):
            self.is_live = True
            self._adapter.clear_grad(self.param, self._grad_view)
        else:
            self._adapter.unbind_grad(self.param)

    def own_grad(self, *, zeros: bool = False) -> None:
        """Make the framework a gradient of its own, with the values of shared memory or zeros."""
        self._adapter.own_grad(self.param, self._grad_view, zeros=zeros)

    def has_own_grad(self) -> bool:
        """Whether the framework has a gradient elsewhere."""
        return not self.holds_grad() and self.has_grad()

    def remove_grad(self) -> None:
        """Leave the parameter without a gradient, whatever shared memory holds."""
        self._adapter.unbind_grad(self.param)

    def holds_grad(self) -> bool:
        """Whether the gradient lives in shared memory."""
        return self._adapter.holds_grad(self.param, self._grad_view)

    def grad_version(self) -> object:
        """See ``Adapter.grad_version``."""
        return self._adapter.grad_version(self.param)

    def has_grad(self) -> bool:
        """Whether the parameter has a gradient, here or elsewhere."""
        if self.holds_grad():
            return not self._adapter.is_clear(self.param, self._grad_view)
        return self._adapter.grad(self.param, self.name) is not None

    def find_new_data(self) -> FloatArray | None:
        """Return the array that has taken the place of the view, or None.

        Raises:
            PartitionError: It has another shape or dtype.
        """
        if self._adapter.holds_data(self.param, self._data_view):
            return None
        array = self._adapter.data(self.param, self.name)
        require_like("data", self.name, array, self.data)
        return array

    def find_new_grad(self) -> tuple[bool, FloatArray | None]:
        """Return whether there is a gradient, and the array that has taken the view's place.

        Raises:
            PartitionError: It has another shape or dtype.
        """
        adapter, param, view = self._adapter, self.param, self._grad_view
        if adapter.holds_grad(param, view):
            return not adapter.is_clear(param, view), None
        array = adapter.grad(param, self.name)
        if array is not None:
            require_like("grad", self.name, array, self.data)
        return array is not None, array

    def write_grad(self, array: FloatArray) -> None:
        """Copy a gradient into shared memory and bind it."""
        self._holder.copy(self.grad, array)
        self.bind_grad()

    def zero_grad(self) -> None:
        """Zero the gradient in shared memory: other ranks add what is there."""
        if self.is_live:
            self._holder.zero(self.grad)

    def copy_out(self) -> "Departure":
        """Copy value and gradient, as far as they live in shared memory; nothing changes."""
        adapter, param = self._adapter, self.param
        is_bound = adapter.holds_data(param, self._data_view)
        has_grad = self.holds_grad() and not adapter.is_clear(param, self._grad_view)
        data = self._holder.duplicate(self.own_data) if is_bound else None
        grad = self._holder.duplicate(self.grad) if has_grad else None
        return Departure(self, data, grad)

    def leave(self, departure: "Departure") -> None:
        """Leave the parameter to its user, with memory of its own."""
        adapter, param = self._adapter, self.param
        if departure.data is not None:
            adapter.bind_data(param, adapter.view(param, departure.data))
        if departure.grad is not None:
            adapter.bind_grad(param, adapter.view(param, departure.grad))
        elif self.holds_grad():
            adapter.unbind_grad(param)
        adapter.detach(param)

    def release(self) -> None:
        """Leave the parameter without a gradient; its value stays where it is."""
        self._adapter.release(self.param)
        self.forget()

    def forget(self) -> None:
        """Release all memory."""
        del self.data, self.own_data, self.grad, self._data_view, self._grad_view


@dataclass(frozen=True, slots=True, eq=False)
class Departure:
    """A parameter that is about to leave the optimizer.

    Attributes:
        binding: Its own.
        data: Memory for its value, which it has already; None if it lives elsewhere.
        grad: Memory for its gradient, likewise; None if it lives elsewhere or there is none.
    """

    binding: Binding
    data: FloatArray | None
    grad: FloatArray | None


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
    bounds = sorted((*byte_bounds(array), i) for i, array in enumerate(arrays) if array.size)
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


def byte_bounds(array: FloatArray) -> tuple[int, int]:
    """Return the addresses between which an array lies."""
    low, high = np.lib.array_utils.byte_bounds(_outline(array))
    return int(low), int(high)


def _overlap(left: FloatArray, right: FloatArray) -> bool:
    try:
        pair = _outline(left), _outline(right)
        return np.shares_memory(*pair, max_work=100_000)  # type: ignore[arg-type]  # stub
    except np.exceptions.TooHardError:
        return True


class _Outline:
    """The addresses of an array of a device, which nobody reads."""

    def __init__(self, array: Any) -> None:
        interface = array.__cuda_array_interface__
        self.__array_interface__ = {key: interface.get(key) for key in _OUTLINE_KEYS}


_OUTLINE_KEYS = ("data", "shape", "strides", "typestr", "version")


def _outline(array: FloatArray) -> FloatArray:
    """Return an array with the addresses of one that may be on a device."""
    return np.asarray(_Outline(array)) if is_on_device(array) else array


def may_overlap(left: FloatArray, right: FloatArray) -> bool:
    """Whether two arrays may share memory."""
    (start, stop), (first, last) = byte_bounds(left), byte_bounds(right)
    return start < last and first < stop


def read_before_write(
    arrays: Mapping[int, FloatArray], shared: Sequence[FloatArray]
) -> dict[int, FloatArray]:
    """Copy those arrays that lie in shared memory, so that none changes while it is written."""
    return {
        index: array.copy() if any(may_overlap(array, s) for s in shared) else array
        for index, array in arrays.items()
    }
