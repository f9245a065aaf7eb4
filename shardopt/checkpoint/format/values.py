"""Values of ``extra`` and of param groups, as JSON with arrays beside it, and back.

JSON has no tuples, no inf and NaN, no arrays, and no keys other than strings. An object with a
single key that begins with ``$`` stands for one of those, or for a dict that has such a key itself.

Tensors of frameworks are arrays here; the *form* of an array says what it was, for example
``torch.bfloat16``. It is empty for NumPy's.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardopt.checkpoint.format.fields import MAX_INTEGER_BITS, Fields, damaged
from shardopt.checkpoint.format.manifest import ARRAY_DTYPES, ArrayEntry, Manifest
from shardopt.checkpoint.format.messages import must
from shardopt.errors import CheckpointError, DamagedCheckpointError

Array = NDArray[Any]

_CONVERT = "Convert it, or leave it out"
_MAX_DEPTH = 64
_SPECIAL_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Stored(NamedTuple):
    """An array that is to be saved, C-contiguous, and its form."""

    array: Array
    form: str = ""


class Encoder:
    """Turns values into JSON, with the arrays found in them beside it.

    Args:
        file: Index of the file that holds the arrays.
        store: Returns the array and the form of a framework's tensor, and None for anything else;
            raises ``TypeError``, ``ValueError`` or ``RuntimeError`` for one that cannot be saved.

    Attributes:
        arrays: The arrays found so far; the JSON refers to them by file and index.
    """

    def __init__(
        self, file: int, store: Callable[[Any], tuple[Any, str] | None] = lambda _: None
    ) -> None:
        self.arrays: list[Stored] = []
        self._file = file
        self._store = store

    def encode(self, value: Any, where: str, depth: int = 0) -> Any:
        """Turn a value into JSON.

        Args:
            value: None, bool, int, float, str, list, tuple, dict, NumPy scalar, a tensor that
                ``store`` knows, or anything that NumPy makes an array of without a copy of objects.
            where: A name for the value, for messages.
            depth: How deep the value lies in a larger one.

        Raises:
            CheckpointError: Something in it, which the message names, cannot be saved.
        """
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) is bool:
            return value
        if isinstance(value, str):
            return str.__str__(value)  # of a subclass, such as an enum, too
        if isinstance(value, int):
            return _encode_integer(value, where)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if depth == _MAX_DEPTH:
            rule, remedy = f"be at most {_MAX_DEPTH} deep", "Check whether it refers to itself"
            raise CheckpointError(must(where, rule, "more", remedy))
        if isinstance(value, Mapping):
            return self._encode_mapping(value, where, depth)
        if isinstance(value, list | tuple):
            items = [self.encode(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        self.arrays.append(self._stored(value, where))
        return {"$array": [self._file, len(self.arrays) - 1]}

    def _encode_mapping(self, value: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
        items = {k: self.encode(v, f"{where}[{k!r}]", depth + 1) for k, v in value.items()}
        if all(type(key) is str and not key.startswith("$") for key in items):
            return items
        keys = [_encode_key(key, f"a key of {where}", depth + 1) for key in items]
        return {"$items": [[key, item] for key, item in zip(keys, items.values(), strict=True)]}

    def _stored(self, value: Any, where: str) -> Stored:
        got = type(value).__name__
        try:
            stored = self._store(value) or _as_array(value)
        except (RuntimeError, TypeError, ValueError) as error:
            stored, got = None, f"{got} ({' '.join(str(error).split()):.100})"
        if stored is None or stored[0].dtype.name not in ARRAY_DTYPES:
            got = got if stored is None else f"an array of {stored[0].dtype}"
            rule = "be None, a number, text, list, tuple, dict or array"
            raise CheckpointError(must(where, rule, got, _CONVERT))
        array = np.asarray(stored[0], stored[0].dtype.newbyteorder("<"))
        return Stored(np.ascontiguousarray(array).reshape(array.shape), stored[1])


def array_place(encoded: Any) -> tuple[int, int] | None:
    """Return file and index of an encoded value that is a single array; None for any other."""
    if isinstance(encoded, dict) and list(encoded) == ["$array"]:
        place = encoded["$array"]
        if isinstance(place, list) and len(place) == 2 and all(type(n) is int for n in place):
            return place[0], place[1]
    return None


def stored_array(manifest: Manifest, encoded: Any) -> ArrayEntry | None:
    """Return the entry of an encoded value that is a single array of a checkpoint, or None."""
    file, index = array_place(encoded) or (-1, -1)
    if not 0 <= file < len(manifest.files):
        return None
    arrays = manifest.files[file].arrays
    return arrays[index] if 0 <= index < len(arrays) else None


def decode(value: Any, array: Callable[[int, int], Any], depth: int = 0) -> Any:
    """Turn the JSON that ``Encoder`` made back into the value.

    Args:
        value: The JSON.
        array: Returns the array of a file and index, or what stands for it, or raises
            ``IndexError``.
        depth: How deep the value lies in a larger one.

    Raises:
        DamagedCheckpointError: ``Encoder`` does not write such JSON.
    """
    if depth > 2 * _MAX_DEPTH:
        raise damaged("a value", f"be at most {_MAX_DEPTH} deep", "more")
    if isinstance(value, list):
        return [decode(item, array, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: decode(item, array, depth + 1) for key, item in value.items()}
    ((kind, content),) = value.items()
    if kind == "$float" and isinstance(content, str) and content in _SPECIAL_FLOATS:
        return _SPECIAL_FLOATS[content]
    if kind == "$tuple" and isinstance(content, list):
        return tuple(decode(content, array, depth + 1))
    if kind == "$items" and isinstance(content, list):
        return _decode_items(content, array, depth)
    if kind == "$array":
        with suppress(IndexError, TypeError):  # no such array, or not two numbers
            return array(*Fields.counts(content, "the place of an array"))
    raise damaged("a value", "be one that was saved", value)


def _encode_integer(value: int, where: str) -> int:
    if value.bit_length() > MAX_INTEGER_BITS:
        rule, remedy = f"have at most {MAX_INTEGER_BITS} bits", "Save it as text, or leave it out"
        raise CheckpointError(must(where, rule, value.bit_length(), remedy))
    return int.__int__(value)


def _encode_key(key: Any, where: str, depth: int) -> Any:
    """Encode a key, which must come back as one: torch's tensors are hashable, arrays are not."""
    encoder = Encoder(0, lambda each: (np.empty(0), "") if hasattr(each, "__array__") else None)
    encoded = encoder.encode(key, where, depth)
    try:
        hash(decode(encoded, _no_array))
    except (DamagedCheckpointError, TypeError):
        rule = "be None, a number, text or a tuple of those"
        raise CheckpointError(must(where, rule, type(key).__name__, _CONVERT)) from None
    return encoded


def _no_array(file: int, index: int) -> Array:
    raise IndexError


def _decode_items(
    content: list[Any], array: Callable[[int, int], Any], depth: int
) -> dict[Any, Any]:
    def inner(item: Any) -> Any:
        return decode(item, array, depth + 1)

    try:
        return {inner(key): inner(item) for key, item in content}
    except DamagedCheckpointError:  # a ValueError, which says more
        raise
    except (TypeError, ValueError):  # no pair, or a key that cannot be one
        raise damaged("a value", "be one that was saved", content) from None


def _as_array(value: Any) -> tuple[Array, str] | None:
    """Return what NumPy makes of an array of any library, or None if it is none."""
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        with suppress(RuntimeError, TypeError, ValueError):  # on a device
            return np.asarray(value), ""
    return None
