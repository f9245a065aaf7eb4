"""The values in param groups: as they are taken from users, saved, and restored.

[Note: values of param groups]
Hyperparameters are taken as plain Python values when a group is added, whatever a configuration
library made of them: such objects may know the whole configuration, and fail in a copy or a pickle
much later. Tensors and arrays that can be filled in place stay as they are, because schedulers and
users do so: they are read at every step, saved as plain numbers and filled when a state is
restored. Whatever else users put into a group is theirs and stays the same object.
"""

import os
from collections.abc import Mapping, Sequence
from decimal import Decimal
from enum import Enum
from numbers import Number, Real
from typing import Any

import numpy as np

from shardopt.errors import HyperparamsError
from shardopt.params.groups import Group, group_values
from shardopt.rule.hyperparams import FLAGS, Rule, as_flag, as_real
from shardopt.rule.rules import HYPERPARAM_NAMES

_PLAIN = (type(None), bool, int, float, str)
_MAX_DEPTH = 16
_MAX_INTEGER_BITS = 1024


def make_plain(group: Group, rule: Rule) -> None:
    """Replace the hyperparameters of a new group by plain values, apart from what is writable.

    Args:
        group: The group.
        rule: The rule that they are for.

    Raises:
        HyperparamsError: One is missing or has another type.
    """
    for name in rule.names():
        if name not in group:
            raise HyperparamsError(
                f"a param group must have {name}; got none. Put it into the group or into "
                "opt.defaults."
            )
        group[name] = _as_plain(name, group[name])


def saved_values(group: Group) -> tuple[Group, dict[str, str]]:
    """Return the values of a group as files can hold them.

    Returns:
        None, bools, numbers, strings, arrays, and lists, tuples and dicts of them; and what had to
        be left out, with the name of its type.
    """
    saved, left_out = {}, {}
    for name, value in group_values(group).items():
        try:
            is_number = name in HYPERPARAM_NAMES and _numel(value) == 1
            saved[name] = _as_saved(value.item() if is_number else value)
        except Exception:  # of whatever users put there
            left_out[name] = type(value).__name__
    return saved, left_out


def update_groups(groups: Sequence[Group], values: Sequence[Group]) -> None:
    """Continue from other values: numbers are filled into tensors and arrays that are there."""
    filled: dict[int, float] = {}
    for group, new in zip(groups, values, strict=True):
        for name, value in new.items():
            group[name] = _renewed(group.get(name), value, filled)


def _renewed(current: Any, value: Any, filled: dict[int, float]) -> Any:
    """Return what a group is to hold in the place of its current value.

    Args:
        current: The current value.
        value: The new one.
        filled: What has been filled into each object, as several groups may share one.
    """
    if isinstance(current, list | tuple) and isinstance(value, list | tuple):
        if len(current) != len(value) or not any(map(_is_writable, current)):
            return value
        pairs = zip(current, value, strict=True)
        return tuple([_renewed(old, new, filled) for old, new in pairs])
    if not isinstance(value, int | float) or not _is_writable(current):
        return value  # a tensor takes the other's place, as in torch
    if filled.setdefault(id(current), value) != value:
        return value
    if isinstance(current, np.ndarray):
        current.fill(value)
    else:
        current.detach().fill_(value)
    return current


def _as_plain(name: str, value: Any) -> Any:
    if type(value) in _PLAIN or _is_writable(value):
        return value  # an invalid one is reported by ``Hyperparams``
    if name == "betas":
        return _plain_betas(value)
    if name in FLAGS:
        return as_flag(name, value)
    if isinstance(value, str):
        return str.__str__(value)
    return as_real(name, value)


def _plain_betas(value: Any) -> Any:
    try:
        items = list(value)
    except TypeError:
        return value
    plain = [_as_plain(f"betas[{index}]", item) for index, item in enumerate(items)]
    if type(value) is list and all(new is old for new, old in zip(plain, value, strict=True)):
        return value  # it can be edited in place, as in torch
    return tuple(plain)


def _is_writable(value: Any) -> bool:
    """Whether a value is a number that can be filled in place."""
    if isinstance(value, np.ndarray):
        return value.size == 1 and value.flags.writeable
    return hasattr(value, "fill_") and _numel(value) == 1  # torch's tensors


def _numel(value: Any) -> int | None:
    """Return the number of elements of an array or a tensor; None for all else."""
    shape = getattr(value, "shape", None)
    return None if shape is None or not hasattr(value, "item") else int(np.prod(shape, dtype=int))


def _as_saved(value: Any, depth: int = 0) -> Any:
    """Return a value in the form described for ``saved_values``.

    Raises:
        Exception: It has none.
    """
    if depth > _MAX_DEPTH:
        raise ValueError
    if isinstance(value, Enum):
        return _as_saved(value.value, depth + 1)
    if _numel(value) is not None:
        return _as_saved_scalar(value.item()) if value.ndim == 0 else _as_array(value)
    if isinstance(value, Number | str):
        return _as_saved_scalar(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {_as_key(k, depth): _as_saved(v, depth + 1) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        items = [_as_saved(item, depth + 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None:
        return None
    raise TypeError


def _as_saved_scalar(value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value.bit_length() <= _MAX_INTEGER_BITS:
        return int(value)
    if isinstance(value, Real | Decimal):
        return float(value)
    raise TypeError


def _as_key(key: Any, depth: int) -> Any:
    """Return a key of a dict: None, text, a number, or a tuple of those."""
    plain = _as_saved(key, depth + 1)
    hash(plain)
    return plain


def _as_array(value: Any) -> Any:
    """Return an array or a tensor as an array of numbers in this machine's memory."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except (RuntimeError, TypeError):  # torch's bfloat16
        array = np.asarray(value.float())
    if array.dtype.kind not in "biufc":
        raise TypeError
    return array
