"""Values of ``extra`` and of param groups, as JSON with arrays beside it, and back.

JSON has no tuples, no inf and NaN, no arrays, and no keys other than strings. An object with a
single key that begins with ``$`` stands for one of those, or for a dict that has such a key itself.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardopt.checkpoint.format.fields import MAX_INTEGER_BITS, Fields, damaged
from shardopt.checkpoint.format.manifest import ARRAY_DTYPES
from shardopt.checkpoint.format.messages import must
from shardopt.errors import CheckpointError, DamagedCheckpointError

Array = NDArray[Any]

_CONVERT = "Convert it, or leave it out"
_MAX_DEPTH = 64
_SPECIAL_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any, where: str, file: int, arrays: list[Array], depth: int = 0) -> Any:
    """Turn a value into JSON.

    Args:
        value: None, bool, int, float, str, list, tuple, dict, NumPy scalar, or anything that NumPy
            makes an array of without a copy of objects, as torch's tensors on the CPU.
        where: A name for the value, for messages.
        file: Index of the file that holds the arrays.
        arrays: Arrays found are appended to this list, C-contiguous; the JSON refers to them by
            file and index.
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
        if value.bit_length() > MAX_INTEGER_BITS:
            rule, remedy = (
                f"have at most {MAX_INTEGER_BITS} bits",
                "Save it as text, or leave it out",
            )
            raise CheckpointError(must(where, rule, value.bit_length(), remedy))
        return int.__int__(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if depth == _MAX_DEPTH:
        rule, remedy = f"be at most {_MAX_DEPTH} deep", "Check whether it refers to itself"
        raise CheckpointError(must(where, rule, "more", remedy))
    if isinstance(value, Mapping):
        return _encode_mapping(value, where, file, arrays, depth)
    if isinstance(value, list | tuple):
        items = [encode(v, f"{where}[{i}]", file, arrays, depth + 1) for i, v in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    arrays.append(_as_array(value, where))
    return {"$array": [file, len(arrays) - 1]}


def decode(value: Any, array: Callable[[int, int], Any], depth: int = 0) -> Any:
    """Turn the JSON that ``encode`` made back into the value.

    Args:
        value: The JSON.
        array: Returns the array of a file and index, or what stands for it, or raises
            ``IndexError``.
        depth: How deep the value lies in a larger one.

    Raises:
        DamagedCheckpointError: ``encode`` does not write such JSON.
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


def _encode_mapping(
    value: Mapping[Any, Any], where: str, file: int, arrays: list[Array], depth: int
) -> dict[str, Any]:
    def inner(item: Any, name: str) -> Any:
        return encode(item, name, file, arrays, depth + 1)

    items = {key: inner(item, f"{where}[{key!r}]") for key, item in value.items()}
    if all(type(key) is str and not key.startswith("$") for key in items):
        return items
    keys = [_encode_key(key, f"a key of {where}", depth + 1) for key in items]
    return {"$items": [[key, item] for key, item in zip(keys, items.values(), strict=True)]}


def _encode_key(key: Any, where: str, depth: int) -> Any:
    """Encode a key, which must come back as one: torch's tensors are hashable, arrays are not."""
    encoded = encode(key, where, 0, [], depth)
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


def _as_array(value: Any, where: str) -> Array:
    array = None
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        detach = getattr(value, "detach", None)
        try:
            array = np.asarray(detach() if callable(detach) else value)
        except (RuntimeError, TypeError, ValueError):  # on a device, or of torch's bfloat16
            array = None
    if array is None or array.dtype.name not in ARRAY_DTYPES:
        got = type(value).__name__ if array is None else f"an array of {array.dtype}"
        rule = "be None, a number, text, list, tuple, dict or array"
        raise CheckpointError(must(where, rule, got, _CONVERT))
    array = np.asarray(array, array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(array.shape)
