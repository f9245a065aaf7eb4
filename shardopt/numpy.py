"""The optimizers for models written in NumPy: ``from shardopt.numpy import AdamW, Parameter``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from shardopt.backends.base import is_on_device
from shardopt.comm.consensus import attempt
from shardopt.core import signatures
from shardopt.core.front_end import InPlaceFrontEnd
from shardopt.errors import PartitionError
from shardopt.layout.dtypes import is_floating
from shardopt.params.adapter import array_error
from shardopt.params.array_adapter import ArrayAdapter
from shardopt.params.groups import defaults_of, make_groups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardopt._typing import FloatArray

__all__ = ["Adam", "AdamW", "NAdam", "Parameter", "RAdam"]


class Parameter:
    """An array to be trained.

    Once an optimizer has it, ``data`` is this rank's view of a value of which the node has one
    copy. Write into it, alike on all ranks, and the next step adopts it. Write gradients into
    ``grad`` (``p.grad += ...``), which is this rank's own. If you assign another array to either
    attribute, the next step copies it in.

    A CuPy array stays on its GPU: ``data`` and ``grad`` are CuPy arrays then.

    Args:
        array: Initial value, [any shape], floating point; NumPy's or CuPy's.
        name: Its name in messages and checkpoints; None names it by its position.

    Attributes:
        data: The value.
        grad: The gradient, of the same shape and dtype, or None. If it is None on every rank, the
            next step skips the parameter.
        name: The name given, or None.
    """

    __slots__ = ("__weakref__", "data", "grad", "name")

    def __init__(self, array: Any, name: str | None = None) -> None:
        self.data: Any = array
        self.grad: Any = None
        self.name = name

    def __repr__(self) -> str:
        return f"Parameter({self.name!r}, shape={np.shape(self.data)})"


class _ArrayOptimizer(InPlaceFrontEnd):
    """An optimizer of ``Parameter``s."""

    def _set_up(self, arguments: Mapping[str, Any]) -> None:
        defaults = defaults_of(self.rule, arguments)
        groups = attempt(make_groups, arguments["params"], defaults)
        self._start(groups, _NumpyAdapter(), defaults, arguments)


class NAdam(signatures.NAdam, _ArrayOptimizer):
    """NAdam as torch.optim.NAdam computes it, sharded over MPI ranks.

    ``params`` is a sequence of ``Parameter``s, of (name, parameter) pairs, or of dicts with
    ``params`` and hyperparameters.

    Collective: construction and most methods; see ``core.Optimizer`` for those and for the errors.

    Example:
        >>> w = Parameter(np.ones(3, np.float32), "w")
        >>> with NAdam([w], lr=0.1) as opt:
        ...     w.grad += 2 * w.data
        ...     opt.step()
    """


class Adam(signatures.Adam, _ArrayOptimizer):
    """Adam as torch.optim.Adam computes it, sharded over MPI ranks; see ``NAdam``."""


class AdamW(signatures.AdamW, _ArrayOptimizer):
    """AdamW as torch.optim.AdamW computes it, sharded over MPI ranks; see ``NAdam``."""


class RAdam(signatures.RAdam, _ArrayOptimizer):
    """RAdam as torch.optim.RAdam computes it, sharded over MPI ranks; see ``NAdam``."""


class _NumpyAdapter(ArrayAdapter[Parameter]):
    """See ``Adapter``."""

    grads_from_start = True

    def name(self, param: Parameter) -> str | None:
        if not isinstance(param, Parameter):
            raise PartitionError(
                f"params must hold shardopt.numpy.Parameter; got {type(param).__name__}. "
                "Wrap arrays: Parameter(array, name='...')."
            )
        return param.name

    def data(self, param: Parameter, name: str) -> FloatArray:
        return _dense_array("data", name, param.data)

    def value(self, value: Any, name: str) -> FloatArray:
        return _dense_array("data", name, value)

    def grad(self, param: Parameter, name: str) -> FloatArray | None:
        return None if param.grad is None else _dense_array("grad", name, param.grad)


def _is_from_cupy(array: object) -> bool:
    """Whether an object is CuPy's, which need not be imported for that."""
    return type(array).__module__.partition(".")[0] == "cupy"


def _dense_array(role: str, name: str, value: Any) -> FloatArray:
    if type(value) is np.ndarray and is_floating(value.dtype):  # the usual case, and fast
        return value
    kind = type(value).__name__
    if hasattr(value, "toarray"):
        raise array_error(role, name, rule="dense", got=kind, remedy="Call .toarray() on it")
    if is_on_device(value) and not _is_from_cupy(value):
        of = type(value).__module__.partition(".")[0]
        raise array_error(
            role,
            name,
            rule="a NumPy or CuPy array",
            got=f"a {kind} of {of}",
            remedy="Share its memory: cupy.asarray(x)",
        )
    try:
        array: FloatArray = value if is_on_device(value) else np.asarray(value)
    except ValueError as error:  # nested lists of unequal length
        raise array_error(
            role, name, rule="an array", got=f"a {kind}", remedy="Make it a NumPy array"
        ) from error
    if not is_floating(array.dtype):
        raise array_error(
            role,
            name,
            rule="floating point",
            got=f"dtype {array.dtype}",
            remedy="Convert it with .astype(np.float32)",
        )
    return array
