"""The param groups that an optimizer knows, beside those that its user has edited since."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from shardopt.params.groups import Group

_NAMES = "param_names"
_params_of = itemgetter("params")


class KnownGroups:
    """Remembers which parameters are in which groups, to find edits and to undo them.

    Everything is compared by identity: tensors that are compared with ``==`` return tensors.
    """

    def __init__(self) -> None:
        self._groups: list[Group] = []
        self._lists: list[list[Any]] = []  # which users have in their hands
        self._sizes: list[int] = []
        self._params: list[Any] = []
        self._names: list[list[str] | None] = []

    def is_same(self, groups: Sequence[Any]) -> bool:
        """Whether groups are the very ones that are known, with the parameters known; fast."""
        try:
            lists = list(map(_params_of, groups))
            return (
                len(groups) == len(self._groups)
                and all(map(is_, groups, self._groups))
                and all(map(is_, lists, self._lists))
                and list(map(len, lists)) == self._sizes
                and all(map(is_, chain.from_iterable(lists), self._params))
            )
        except (KeyError, TypeError):  # something in them is not a group
            return False

    def has_params_of(self, groups: Sequence[Group]) -> bool:
        """Whether groups, maybe copies of those known, have the parameters that are known."""
        return [len(group["params"]) for group in groups] == self._sizes and all(
            map(is_, chain.from_iterable(map(_params_of, groups)), self._params)
        )

    def extend(self, groups: Sequence[Group]) -> None:
        """Take note of more groups."""
        for group in groups:
            names = group.get(_NAMES)
            self._groups.append(group)
            self._lists.append(group["params"])
            self._sizes.append(len(group["params"]))
            self._params += group["params"]
            self._names.append(None if names is None else list(names))

    def replace(self, groups: Sequence[Group]) -> None:
        """Take note of other groups."""
        for notes in (self._groups, self._lists, self._sizes, self._params, self._names):
            notes.clear()
        self.extend(groups)

    def restore(self, groups: list[Any]) -> None:
        """Undo all edits: put the groups known into ``groups``, and their parameters into them."""
        groups[:] = self._groups
        first = 0
        known = zip(self._groups, self._lists, self._sizes, self._names, strict=True)
        for group, params, size, names in known:
            params[:] = self._params[first : first + size]
            group["params"] = params
            first += size
            if names is None:
                group.pop(_NAMES, None)
            else:
                group[_NAMES] = list(names)


def params_in(groups: Sequence[Any]) -> Iterator[Any]:
    """Yield the parameters in groups that a user may have edited into anything."""
    for group in groups:
        with suppress(KeyError, TypeError):
            yield from group["params"]
