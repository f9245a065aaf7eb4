"""``opt.state``: dicts as torch's optimizers have them, which report what users put into them."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, Protocol

ON_DEMAND: Any = object()
"""In an entry, stands for a value that ``Owner.show`` returns."""

ABSENT: Any = object()
"""Returned by ``State.peek`` for a parameter that has no entry."""


class Owner(Protocol):
    """The object behind the dicts."""

    def refresh(self) -> None:
        """Update the step counts in entries, and which entries there are."""
        ...

    def show(self, param: Any, key: Any) -> Any:
        """Update a value in all entries that is about to be read.

        Returns:
            The value of a parameter's entry if it is one on demand, else None.
        """
        ...

    def entry_of(self, param: Any) -> "Entry":
        """Return an entry for a parameter whose entry has not been asked for, or is missing.

        Raises:
            KeyError: The parameter is not the optimizer's.
        """
        ...

    def note_write(self, param: Any) -> None:
        """Remember that a parameter's entry has been written to, replaced or removed."""
        ...


class _Watched(dict[Any, Any]):
    """A dict whose methods all go through the five that subclasses define.

    A copy of it, of whatever kind, is a plain dict.
    """

    def pop(self, key: Any, *default: Any) -> Any:
        """Remove a value and return it, or the default."""
        if key not in self:
            if default:
                return default[0]
            raise KeyError(key)
        value = self[key]
        del self[key]
        return value

    def clear(self) -> None:
        """Remove everything."""
        for key in list(self):
            del self[key]

    def copy(self) -> dict[Any, Any]:
        """Return a plain dict with the same values."""
        return dict(self.items())

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __or__(self, other: Any) -> Any:
        return self.copy() | dict(other)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.copy(),)

    def __repr__(self) -> str:
        return repr(self.copy())


for _name in ("get", "items", "keys", "popitem", "setdefault", "update", "values"):
    setattr(_Watched, _name, getattr(MutableMapping, _name))  # those of dict go past subclasses


class Entry(_Watched):
    """The state of one parameter.

    Args:
        values: Its values, as for ``dict``; tools rebuild dicts of the same class from them.
        owner: What stands behind it, or None for a dict like any other.
        param: The parameter.
        missing: Why arrays are missing, for a ``KeyError``.
    """

    def __init__(
        self,
        values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        owner: Owner | None = None,
        param: Any = None,
        missing: str | None = None,
    ) -> None:
        dict.__init__(self, values)
        self._owner, self._param, self._missing = owner, param, missing

    def __getitem__(self, key: str) -> Any:
        shown = None if self._owner is None else self._owner.show(self._param, key)
        try:
            value = dict.__getitem__(self, key)
        except KeyError:
            if self._missing is None:
                raise
            raise KeyError(f"no {key!r} here: {self._missing}") from None
        return shown if value is ON_DEMAND else value

    def __setitem__(self, key: str, value: Any) -> None:
        dict.__setitem__(self, key, value)
        self._note_write()

    def __delitem__(self, key: str) -> None:
        dict.__delitem__(self, key)
        self._note_write()

    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self)

    def __len__(self) -> int:
        return dict.__len__(self)

    def is_of(self, owner: Owner, param: Any) -> bool:
        """Whether it is the owner's entry for a parameter."""
        return self._owner is owner and self._param is param

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go back to values that the owner knows."""
        dict.clear(self)
        dict.update(self, values)

    def detach(self) -> None:
        """Make it a dict like any other, with the values that it has."""
        if any(dict.__getitem__(self, key) is ON_DEMAND for key in self):
            dict.update(self, self.copy())
        self._owner = None

    def _note_write(self) -> None:
        if self._owner is not None:
            self._owner.note_write(self._param)


class State(_Watched):
    """The entries of all parameters; each is made when it is first asked for.

    Args:
        values: As for ``dict``.
        owner: See ``Entry``.
    """

    def __init__(
        self, values: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = (), owner: Owner | None = None
    ) -> None:
        dict.__init__(self, values)
        self._owner = owner

    def __getitem__(self, param: Any) -> Any:
        owner = self._owner
        if owner is not None:
            owner.refresh()
            stored = self.peek(param)
            if stored is None or stored is ABSENT:
                dict.__setitem__(self, param, owner.entry_of(param))
        return dict.__getitem__(self, param)

    def __setitem__(self, param: Any, entry: Any) -> None:
        dict.__setitem__(self, param, entry)
        self._note_write(param)

    def __delitem__(self, param: Any) -> None:
        dict.__delitem__(self, param)
        self._note_write(param)

    def __contains__(self, param: object) -> bool:
        self._refresh()
        return dict.__contains__(self, param)  # __getitem__ makes entries, as a defaultdict's

    def __iter__(self) -> Iterator[Any]:
        self._refresh()
        return dict.__iter__(self)

    def __len__(self) -> int:
        self._refresh()
        return dict.__len__(self)

    def get(self, param: Any, default: Any = None) -> Any:
        """Return an entry, or the default."""
        return self[param] if param in self else default  # noqa: SIM401  # it would call itself

    def peek(self, param: Any) -> Any:
        """Return what is stored: an entry, None before it has been asked for, or ``ABSENT``."""
        return dict.get(self, param, ABSENT)

    def put(self, param: Any, entry: dict[str, Any] | None) -> None:
        """Store an entry, or None for one to be made when it is asked for; the owner knows."""
        dict.__setitem__(self, param, entry)

    def discard(self, param: Any) -> None:
        """Remove what is stored, if anything; the owner knows."""
        dict.pop(self, param, None)

    def detach(self) -> None:
        """Make it a dict like any other, with the entries that it has."""
        for entry in list(self.values()):
            if isinstance(entry, Entry):
                entry.detach()
        self._owner = None

    def _refresh(self) -> None:
        """Add the entries of parameters that have come to have one, before anybody iterates."""
        if self._owner is not None:
            self._owner.refresh()

    def _note_write(self, param: Any) -> None:
        if self._owner is not None:
            self._owner.note_write(param)
