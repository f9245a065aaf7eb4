"""Param groups, as in torch.optim, completed with every hyperparameter."""

from collections.abc import Iterable, Mapping, Reversible, Sequence, Set
from operator import is_
from typing import Any

from shardopt.errors import HyperparamsError, PartitionError
from shardopt.params.adapter import Adapter
from shardopt.params.forms import BITS_KEY
from shardopt.rule.hyperparams import Hyperparams, Rule
from shardopt.rule.rules import require_own

Group = dict[str, Any]

_OF_PARAMS = ("params", "param_names", BITS_KEY)


def defaults_of(rule: Rule, arguments: Mapping[str, Any]) -> Group:
    """Return the hyperparameters among a constructor's arguments, passed as its ``locals()``.

    Those that the constructor does not have are the rule's.
    """
    usual = rule()
    return {name: arguments.get(name, getattr(usual, name)) for name in rule.names()}


def make_groups(params: Any, defaults: Mapping[str, Any]) -> list[Group]:
    """Complete param groups with the defaults.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts with ``params`` and hyperparameters.
        defaults: The value of each hyperparameter that a dict leaves out.

    Raises:
        PartitionError: There are no parameters, or ``params`` is not an iterable of them.
    """
    entries = _as_list("params", params)
    if not entries:
        raise PartitionError(
            "params must hold at least one parameter; got an empty list. Pass the model's."
        )
    if any(isinstance(entry, dict) for entry in entries):
        groups = [make_group(entry, defaults) for entry in entries]
    else:
        groups = [make_group({"params": entries}, defaults)]
    return groups


def make_group(entry: Any, defaults: Mapping[str, Any]) -> Group:
    """Complete one param group; see ``make_groups``. The names of pairs become ``param_names``."""
    if not isinstance(entry, dict) or "params" not in entry:
        raise PartitionError(
            f"a param group must be a dict with 'params'; got {entry!r:.80}. "
            "Write {'params': [...], 'lr': ...}."
        )
    members = entry["params"]
    members = _as_list("params", members) if _is_iterable(members) else [members]
    group: Group = {**defaults, **entry, "params": members}
    if any(isinstance(member, tuple) for member in members):
        if not all(isinstance(member, tuple) and len(member) == 2 for member in members):
            raise PartitionError(
                "params must be named all or not at all; got both. Pass only (name, parameter)."
            )
        group["param_names"] = [str(name) for name, _ in members]
        group["params"] = [param for _, param in members]
    return group


def complete_groups(groups: Sequence[Any], defaults: Mapping[str, Any]) -> None:
    """Complete groups that users have put together, in place; see ``make_group``.

    Lists of parameters stay the ones that users have in their hands.

    Raises:
        PartitionError: One is not a group.
    """
    for entry in groups:
        made = make_group(entry, defaults)
        is_list = type(entry["params"]) is list and len(entry["params"]) == len(made["params"])
        if is_list and all(map(is_, entry["params"], made["params"])):
            made["params"] = entry["params"]
        entry.update(made)


def own_names(groups: Sequence[Group], adapter: Adapter[Any]) -> list[str | None]:
    """Return the name that each parameter was given, else its own, else None."""
    names: list[str | None] = []
    for group in groups:
        own = [adapter.name(param) for param in group["params"]]
        given = group.get("param_names") or own
        if len(given) != len(own):
            raise PartitionError(
                f"param_names must have one name for each of {len(own)} params; got {len(given)}. "
                "Pass (name, parameter) pairs."
            )
        names += given
    return names


def complete_names(names: Iterable[str | None], first_index: int = 0) -> list[str]:
    """Return names, made from their position for parameters that have none."""
    return [name or f"param{index}" for index, name in enumerate(names, first_index)]


def require_distinct(params: Iterable[Any], names: Sequence[str]) -> None:
    """Check that no parameter is listed twice: it would be updated twice per step.

    Raises:
        PartitionError: A parameter is listed twice; the message names it.
    """
    first_with: dict[int, int] = {}
    for index, param in enumerate(params):
        first = first_with.setdefault(id(param), index)
        if first != index:
            raise PartitionError(
                f"each parameter must be listed once; got {names[first]!r} again as "
                f"{names[index]!r}. Pass tied weights once."
            )


def group_values(group: Group) -> Group:
    """Return the values of a group that belong in a state dict.

    Those are all but parameters, their names, and how their state is kept, which is another matter
    where the state is loaded.
    """
    return {key: value for key, value in group.items() if key not in _OF_PARAMS}


class HyperparamsReader:
    """Reads the groups' hyperparameters before every step, and validates those that changed.

    Args:
        rule: The rule that they are for.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._last: list[tuple[tuple[Any, ...], Hyperparams]] = []

    def read(self, groups: Sequence[Group]) -> list[Hyperparams]:
        """Return the hyperparameters of each group.

        Raises:
            HyperparamsError: A value is out of range or another rule's; the message names its
                group.
        """
        self._last = [
            self._read_one(index, group, self._last[index] if index < len(self._last) else None)
            for index, group in enumerate(groups)
        ]
        return [hyper for _, hyper in self._last]

    def _read_one(
        self, index: int, group: Group, last: tuple[tuple[Any, ...], Hyperparams] | None
    ) -> tuple[tuple[Any, ...], Hyperparams]:
        raw: tuple[Any, ...] = tuple([group.get(name) for name in self._rule.names()])
        plain = all(map(_is_plain, raw))  # an array may be changed in place
        try:
            require_own(self._rule, group)
            if last is not None and plain and raw == last[0]:
                return last
            return raw if plain else (), self._rule(*raw)
        except HyperparamsError as error:
            raise HyperparamsError(f"in param_groups[{index}], {error}") from None


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in (float, int, bool, str)


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) and not hasattr(value, "grad")


def _as_list(name: str, values: Any) -> list[Any]:
    if not _is_iterable(values):
        raise PartitionError(
            f"{name} must be an iterable of parameters or dicts; got {type(values).__name__}. "
            "Put a single parameter into a list."
        )
    require_ordered(name, values)
    return list(values)


def require_ordered(name: str, values: Any) -> None:
    """Refuse sets, which are ordered differently on every rank.

    Raises:
        PartitionError: It is a set. The views of a dict, and other sets with an order, are none.
    """
    if isinstance(values, Set) and not isinstance(values, Reversible):
        raise PartitionError(
            f"{name} must be in order; got {type(values).__name__}. Pass a list in the same order "
            "on every rank."
        )
