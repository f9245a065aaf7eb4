"""Copies of values that the optimizer state holds as codes, as users get them."""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import xxhash

from shardopt._typing import FloatArray
from shardopt.core.array_memory import is_same_memory
from shardopt.core.state_parsing import require
from shardopt.layout.partition import ParamSpec


class _Copy(NamedTuple):
    """A copy that a user has got, and what was in it.

    Attributes:
        array: The memory, as long as anything of the user's shows it.
        value: The copy as the framework has it, likewise; it may have been given other memory.
        what: What it shows.
        numel: Number of values.
        digest: Of the values.
    """

    array: "ref[FloatArray]"
    value: Callable[[], Any]
    what: str
    numel: int
    digest: int

    def shown(self) -> list[FloatArray]:
        """Return the values that the user still has, flat; twice if the copy got other memory.

        Raises:
            TypeError, ValueError, RuntimeError: NumPy cannot read what it shows by now.
        """
        memory, value = self.array(), self.value()
        found = [] if memory is None else [memory.reshape(-1)[: self.numel]]
        if value is not None:
            array = np.asarray(value.detach() if hasattr(value, "detach") else value)
            flat = np.ascontiguousarray(array).reshape(-1)
            if not found or not is_same_memory(flat, found[0]):
                found.append(flat)
        return found


class DecodedCopies:
    """Hands out copies, the same until the state changes, and notices writes to them.

    A write would be lost. NumPy refuses it at once; what other frameworks write is found before the
    next step: in every copy that has been handed out since the last one, and in older ones as long
    as something shows them.
    """

    def __init__(self) -> None:
        self._version = -1
        self._now: dict[tuple[int, str], Any] = {}
        self._handed_out: list[_Copy] = []
        self._kept: list[FloatArray] = []  # until they have been looked at

    def find(self, index: int, key: str, version: int) -> Any:
        """Return the copy of an array of the state of a parameter; None if there is none yet.

        Args:
            index: Number of the parameter.
            key: Name of the array.
            version: A number that grows whenever the state changes.
        """
        if version != self._version:
            self._version = version
            self._now.clear()
        return self._now.get((index, key))

    def add(self, index: int, key: str, spec: ParamSpec, value: Any, array: FloatArray) -> None:
        """Add a copy, after ``find`` has found none.

        Args:
            index: Number of the parameter.
            key: Name of the array.
            spec: The parameter.
            value: The copy as the framework has it.
            array: Its values, as they were decoded.
        """
        self._now[index, key] = value
        memory = array if array.base is None else array.base  # which every view keeps
        if isinstance(value, np.ndarray):
            value.flags.writeable = memory.flags.writeable = False  # for good
            return
        what = f"{key} of {spec.name!r} in opt.state"
        copy = _Copy(ref(memory), _weak(value), what, array.size, _digest(array))
        self._handed_out.append(copy)
        self._kept.append(memory)

    def forget(self) -> None:
        """Make new copies from now on: parameters have other numbers, or other values."""
        self._version = -1

    def require_unwritten(self) -> None:
        """Refuse writes to copies, once each, and keep no copy any longer than its user does.

        Raises:
            CheckpointError: One was written to.
        """
        unwritten, written = list[_Copy](), list[_Copy]()
        for copy in self._handed_out:
            try:
                shown = copy.shown()
                is_written = any(_digest(array) != copy.digest for array in shown)
            except (TypeError, ValueError, RuntimeError):  # it is bfloat16 now, say
                shown, is_written = [], True
            if is_written:
                written.append(copy)
            elif shown:
                unwritten.append(copy)
        self._handed_out = unwritten
        self._now.clear()
        self._kept.clear()
        if written:
            rule = "be assigned to rather than written to in place, as it is a copy of 8-bit codes"
            require(not written, written[0].what, rule, "a write, which is lost", _REMEDY)


_REMEDY = "Write opt.state[param][key] = new values"


def _weak(value: Any) -> Callable[[], Any]:
    try:
        return ref(value)
    except TypeError:  # its class allows no reference: only the memory is looked at
        return lambda: None


def _digest(array: FloatArray) -> int:
    return xxhash.xxh3_64_intdigest(array.data)
