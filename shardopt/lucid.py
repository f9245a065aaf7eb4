"""The optimizers for models written in lucid: ``from shardopt.lucid import AdamW``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
from lucid import Tensor
from lucid.nn import Module, Parameter
from lucid.optim import Optimizer as LucidOptimizer

from shardopt.comm.consensus import attempt
from shardopt.core import signatures
from shardopt.core.front_end import InPlaceFrontEnd
from shardopt.errors import PartitionError
from shardopt.params.adapter import array_error, model_error
from shardopt.params.array_adapter import ArrayAdapter
from shardopt.params.averaged_arrays import AveragedArrays
from shardopt.params.groups import defaults_of, make_groups
from shardopt.params.model import ModelContent, content_of
from shardopt.rule import nadam

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from shardopt._typing import FloatArray
    from shardopt.rule.hyperparams import Hyperparams

__all__ = ["Adam", "AdamW", "NAdam", "RAdam"]


@LucidOptimizer.register  # for isinstance() alone: it inherits none of lucid's methods
class _LucidOptimizer(InPlaceFrontEnd):
    """An optimizer of lucid's parameters; ``NAdam`` describes what all have in common."""

    def _set_up(self, arguments: Mapping[str, Any]) -> None:
        params, defaults = arguments["params"], defaults_of(self.rule, arguments)
        if isinstance(params, Module):
            params = _named_parameters(params)
        names = _names_behind(params)
        groups = attempt(make_groups, params, defaults)
        is_averaging = getattr(arguments["policy"], "stage", 1) == 2
        adapter = (_AveragingAdapter if is_averaging else _LucidAdapter)(names)
        self._start(groups, adapter, defaults, arguments)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set gradients to None, as lucid does, or zero this rank's gradients in place.

        Args:
            set_to_none: Set them to None; ``step`` skips a parameter whose gradient is None on
                every rank. With False, backward adds to shared memory in place: ``step`` then
                copies nothing, and no two parameters hold the same array, to which lucid would add
                twice. In stage 2 it adds to zeros of this rank's own.
        """
        super().zero_grad(set_to_none)


class NAdam(signatures.NAdam, _LucidOptimizer):
    """The NAdam of the paper and of torch, in place of lucid.optim.NAdam, sharded over MPI ranks.

    ``params`` is a module, ``model.parameters()``, (name, parameter) pairs, or dicts with
    ``params`` and hyperparameters. A module, its ``parameters()`` and pairs give parameters the
    names that messages and checkpoints show.

    ``variant="lucid"`` computes the numbers of lucid.optim.NAdam instead. Those are not NAdam's:
    lucid has no momentum schedule, shrinks ``exp_avg`` by ``1 - momentum_decay`` at every step and
    corrects the bias twice, so that early steps are a third as long.

    Arguments begin in lucid's order, and lucid's schedulers accept this optimizer. Either optimizer
    loads the state dicts of the other; ``mu_product``, which lucid does not keep, is then computed
    from ``step``.

    Collective: construction and most methods; see ``core.Optimizer`` for those and for the errors.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> with NAdam(model.parameters(), lr=0.01) as opt:
        ...     for x, y in batches:  # its own on each rank
        ...         opt.zero_grad()
        ...         loss = ((model(x) - y) ** 2).mean()
        ...         loss.backward()
        ...         opt.step()
    """


class Adam(signatures.Adam, _LucidOptimizer):
    """The Adam of the paper and of torch, in place of lucid.optim.Adam, sharded over MPI ranks.

    ``variant="lucid"`` computes the numbers of lucid.optim.Adam instead, which adds ``eps`` before
    the bias correction: a step is smaller where gradients are as small as ``eps``. All that
    ``NAdam`` says of arguments, calls and state dicts holds here, too.
    """


class AdamW(signatures.AdamW, _LucidOptimizer):
    """The AdamW of the paper and of torch, in place of lucid.optim.AdamW, sharded over MPI ranks.

    All that ``Adam`` says holds here, too.
    """


class RAdam(signatures.RAdam, _LucidOptimizer):
    """The RAdam of the paper and of torch, in place of lucid.optim.RAdam, sharded over MPI ranks.

    ``variant="lucid"`` computes the numbers of lucid.optim.RAdam instead. Those are not RAdam's:
    lucid leaves a divisor out of the rectification, so that steps become up to ``sqrt(rho)`` times
    as long, 45 times with the default betas. All that ``NAdam`` says of arguments, calls and state
    dicts holds here, too.
    """


class _LucidAdapter(ArrayAdapter[Parameter]):
    """See ``Adapter``."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names

    def name(self, param: Parameter) -> str | None:
        if not isinstance(param, Parameter):
            raise PartitionError(
                f"params must hold lucid.nn.Parameter; got {type(param).__name__}. "
                "Pass model.parameters(), or wrap tensors: nn.Parameter(tensor)."
            )
        return self._names.get(id(param))

    def data(self, param: Parameter, name: str) -> FloatArray:
        return _dense_array("data", name, param.data)

    def value(self, value: Any, name: str) -> FloatArray:
        return _dense_array("data", name, value)

    def grad(self, param: Parameter, name: str) -> FloatArray | None:
        if param.grad is None:
            return None
        grad = _dense_array("grad", name, param.grad)
        dtype = self.data(param, name).dtype
        with np.errstate(over="ignore"):  # policy.check_finite finds overflows
            # Gradients may be wider than their parameter: float64 inputs make float64 gradients.
            return grad.astype(dtype, casting="same_kind", copy=False)

    def read_entry(self, entry: Mapping[str, Any], hyper: Hyperparams) -> Mapping[str, Any]:
        if "mu_product" in entry or not isinstance(hyper, nadam.NAdam):
            return entry
        return {**entry, "mu_product": nadam.mu_product_at(float(entry["step"]), hyper)}

    def read_model(
        self, model: Any, params: Sequence[Parameter], saved: Collection[str] | None
    ) -> ModelContent:
        if not isinstance(model, Module):
            raise model_error("a lucid.nn.Module", model, "Pass the module itself")
        return content_of(_state(model), params, Tensor, Parameter)

    def load_model(
        self,
        model: Module,
        params: Sequence[Parameter],
        content: ModelContent,
        values: Mapping[str, Any],
    ) -> tuple[Module, Sequence[str]]:
        arrays = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in values.items()}
        model.load_state_dict(arrays, strict=False)  # the optimizer has the rest
        return model, []


class _AveragingAdapter(AveragedArrays[Parameter], _LucidAdapter):
    """The same in stage 2; see ``AveragedArrays``."""

    def __init__(self, names: Mapping[int, str]) -> None:
        AveragedArrays.__init__(self)
        _LucidAdapter.__init__(self, names)


def to_stored(tensor: Tensor) -> tuple[Any, str]:
    """Return a tensor's array, and its form."""
    return tensor.numpy(), f"lucid.{tensor.numpy().dtype.name}"


def from_stored(array: Any, form: str) -> Tensor:
    """Return a tensor of an array."""
    return Tensor(array)


def _names_behind(params: Any) -> dict[int, str]:
    """Return the names of the parameters that a fresh ``module.parameters()`` is going to yield.

    The generator has the module among its local variables. Anything else has no names.
    """
    if not inspect.isgenerator(params) or params.gi_code is not Module.parameters.__code__:
        return {}
    module = inspect.getgeneratorlocals(params).get("self")
    if not isinstance(module, Module):
        return {}
    return {id(param): name for name, param in _named_parameters(module)}


def _named_parameters(module: Module) -> list[tuple[str, Parameter]]:
    """Return the parameters of a module with their names; tied ones once, by the first name."""
    found = {id(value): (name, value) for name, value in reversed(_state(module).items())}
    return [
        (name, value)
        for name, value in _state(module).items()
        if isinstance(value, Parameter) and found[id(value)][0] == name
    ]


def _state(module: Module) -> dict[str, Any]:
    return dict(module.state_dict(keep_vars=True))


def _dense_array(role: str, name: str, value: Any) -> FloatArray:
    if isinstance(value, Tensor):  # Embedding.reset_parameters() assigns one
        value = value.data
    if isinstance(value, np.generic):  # the results of arithmetic with 0-d arrays
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        got = f"{type(value).__module__}.{type(value).__name__}"
        remedy = "Move the model to the CPU: model.to('cpu')"
        raise array_error(role, name, rule="a NumPy array", got=got, remedy=remedy)
    got = f"dtype {value.dtype}"
    if value.dtype.kind == "c":
        remedy = "Train the real and the imaginary part as two parameters"
        raise array_error(role, name, rule="real", got=got, remedy=remedy)
    if value.dtype.kind != "f":
        remedy = "Convert it: .astype(lucid.Float32)"
        raise array_error(role, name, rule="floating point", got=got, remedy=remedy)
    array: FloatArray = value
    return array
