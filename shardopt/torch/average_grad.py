"""The average of a gradient over all ranks, as PyTorch has it in ``p.grad``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from shardopt.errors import PartitionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_ABOUT = (
    *("shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "grad"),
    *("ndim", "is_sparse", "is_cpu", "is_cuda"),
)
_UNREAD = {getattr(Tensor, name).__get__ for name in _ABOUT} | {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous),
    *(Tensor.is_complex, Tensor.is_floating_point, Tensor.element_size),
}
"""Functions that do not look at the elements of a tensor."""

_MEASURES = {torch.linalg.vector_norm, torch.norm, Tensor.norm, torch._foreach_norm}
"""Functions that leave elements alone and keep nothing of them."""


class Factors(NamedTuple):
    """The numbers by which an average was multiplied, one after the other.

    Attributes:
        written: Those that its elements on this rank have been multiplied by already.
        pending: Those that came behind them, and are only remembered.
    """

    written: list[float]
    pending: list[float]


class AverageGrad(Tensor):
    """The average of a gradient over all ranks, as ``p.grad``.

    It waits for ranks that are behind when its elements are first used after a backward. What
    torch makes of it is an ordinary tensor, except that ``p.grad *= 2`` leaves it in ``p.grad``.

    [Note: averages that are multiplied]
    Multiplied in place by a number, as by ``clip_grad_norm_`` and ``GradScaler``, it remembers the
    factor, and the step multiplies the row of the node: each rank would have a copy of its own of
    all pages otherwise, and the step would look for what is in them. A norm is that of the product.
    Whatever else uses the elements finds the product, which is then written. Factors are written at
    once where the elements may be known under another name, as after ``p.grad.data``. Written or
    not may differ between ranks, of which one may log its gradients: the step takes elements that
    are the product, bit by bit, for what they are.
    """

    _read: Callable[[], None]
    _factors: dict[int, Factors]
    _number: int
    _is_aliased: bool

    @classmethod
    def over(
        cls, values: Tensor, read: Callable[[], None], factors: dict[int, Factors], number: int
    ) -> AverageGrad:
        """Return an average.

        Args:
            values: Its elements.
            read: Waits until they are complete.
            factors: On averages, by their numbers.
            number: Its own.
        """
        average = values.as_subclass(cls)
        average._read, average._is_aliased = read, False
        average._factors, average._number = factors, number
        return average

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with ordinary tensors in the place of averages."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _UNREAD:
                return func(*args, **kwargs)
            if func == Tensor.mul_ and len(args) == 2 and not kwargs and _multiply(*args):
                return args[0]
            if func in _OF_MANY and not kwargs:
                others = [each for each in args[0] if not _OF_MANY[func](each, *args[1:])]
                if not others:
                    return None
                args = [others, *args[1:]]
            measures = func in _MEASURES
            found: list[tuple[AverageGrad, Tensor]] = []
            convert = _product if measures else _ordinary
            plain = [_convert(arg, convert, found) for arg in args]
            named = {name: _convert(arg, convert, found) for name, arg in kwargs.items()}
            result = func(*plain, **named)
            is_self = bool(plain) and result is plain[0]
            for average, values in () if measures else found:
                _settle(average, values, None if is_self else result)
        return args[0] if is_self else result


def _convert(
    value: Any, convert: Callable[[AverageGrad], Tensor], found: list[tuple[AverageGrad, Tensor]]
) -> Any:
    """Return an argument with ordinary tensors in the place of averages, which are waited for."""
    if isinstance(value, AverageGrad):
        value._read()
        values = convert(value)
        found.append((value, values))
        return values
    if isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value):
        return type(value)(_convert(each, convert, found) for each in value)
    return value


def _settle(average: AverageGrad, values: Tensor, result: Any) -> None:
    """Have an average follow what torch has done to the tensor in its place.

    Raises:
        PartitionError: It has got another shape or dtype.
    """
    own = average.as_subclass(Tensor)
    if _layout(values) != _layout(own):  # by set_(), or an assignment to its data
        if values.dtype != own.dtype or values.shape != own.shape:
            raise PartitionError(
                f"an average in p.grad must keep shape {list(own.shape)} and dtype {own.dtype}; "
                f"got {list(values.shape)} and {values.dtype}. Put a tensor of its own into p.grad."
            )
        own.copy_(values.detach().clone())
    average._is_aliased = average._is_aliased or _may_hold(result, average)


def _layout(values: Tensor) -> tuple[object, ...]:
    return values.data_ptr(), values.dtype, values.shape, values.stride()


def _ordinary(average: AverageGrad) -> Tensor:
    """Return the elements, multiplied where they are."""
    values = average.as_subclass(Tensor)
    if (factors := average._factors.get(average._number)) is not None:
        for factor in factors.pending:
            values.mul_(factor)
        factors.written.extend(factors.pending)
        factors.pending.clear()
    return values


def _product(average: AverageGrad) -> Tensor:
    """Return the elements, or if there are factors a product of its own."""
    values = average.as_subclass(Tensor)
    if (factors := average._factors.get(average._number)) is not None:
        for factor in factors.pending:
            values = values * factor
    return values


def _multiply(average: Any, factor: Any) -> bool:
    """Remember a factor; return whether the elements may stay as they are until it is needed."""
    if not isinstance(average, AverageGrad) or average.is_complex():
        return False
    if isinstance(factor, Tensor):
        is_number = not isinstance(factor, AverageGrad) and factor.ndim == 0
        if not is_number or factor.requires_grad or factor.is_complex():
            return False
        factor = factor.item()
    if not isinstance(factor, (int, float)):
        return False
    average._read()
    if factor != 1:
        factors = average._factors.setdefault(average._number, Factors([], []))
        (factors.written if average._is_aliased else factors.pending).append(float(factor))
    return not average._is_aliased


def _unscale(average: Any, found_inf: Tensor, factor: Tensor) -> bool:
    """Remember a factor, if that is possible, and note if elements are not finite."""
    if not isinstance(average, AverageGrad) or not _multiply(average, factor):
        return False
    largest = torch.linalg.vector_norm(_product(average), math.inf) if average.numel() else None
    if largest is not None and not math.isfinite(largest):
        found_inf.fill_(1.0)
    return True


_OF_MANY: dict[Any, Callable[..., bool]] = {
    torch._foreach_mul_: _multiply,
    torch._amp_foreach_non_finite_check_and_unscale_: _unscale,
}
"""How to multiply one of many averages, by what multiplies all of them."""


def _may_hold(result: Any, average: AverageGrad) -> bool:
    """Whether something that torch has returned may lead to the elements of an average."""
    if isinstance(result, Tensor):
        if result.requires_grad or result.layout is not torch.strided:
            return True
        return result.untyped_storage().data_ptr() == average.untyped_storage().data_ptr()
    if isinstance(result, (list, tuple)):
        return any(_may_hold(each, average) for each in result)
    return not (result is None or isinstance(result, (bool, float, str, torch.Size)))
