"""A framework's model, as checkpoints see it: what belongs to it besides the parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelContent:
    """The names of a model, and what it holds that the optimizer does not.

    Attributes:
        names: For each parameter of the optimizer its name in the model; None if the model does not
            have it.
        values: Buffers, parameters that the optimizer does not hold, and other state, by name.
        params: The names of those of ``values`` that are parameters.
        aliases: Further names of tied tensors, each with the first name of the same tensor.
        versions: What the framework wants to know about the values when it loads them.
    """

    names: Sequence[str | None]
    values: Mapping[str, Any] = field(default_factory=dict)
    params: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    versions: Any = None


def content_of(
    state: Mapping[str, Any], params: Sequence[Any], tensor: type, parameter: type
) -> ModelContent:
    """Sort what is in a module's state by whether the optimizer holds it.

    Args:
        state: The module's own tensors and other state, by name.
        params: The parameters of the optimizer.
        tensor: The class of tensors, which are tied if they are the same object.
        parameter: The class of parameters.
    """
    index_of = {id(param): index for index, param in enumerate(params)}
    names: list[str | None] = [None] * len(params)
    values: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in state.items():
        if isinstance(value, tensor) and first.setdefault(id(value), name) != name:
            aliases[name] = first[id(value)]
        elif id(value) in index_of:
            names[index_of[id(value)]] = name
        else:
            values[name] = value
    frozen = frozenset(name for name, value in values.items() if isinstance(value, parameter))
    return ModelContent(names, values, frozen, aliases)
