"""The form of a state that ``capture_rng`` has returned; see [Note: nothing but values]."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from shardopt.checkpoint.format.messages import require

Reader: TypeAlias = Callable[[str, Any], Any]
"""Takes the name of a value and the value; returns the value with dicts and lists copied, or raises
``CheckpointError``."""

UNDAMAGED = "Load an undamaged checkpoint"


def brief(value: object) -> str:
    """Describe any value in a few words."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} with shape {value.shape}"
    if isinstance(value, Mapping):
        return f"the keys {', '.join(map(brief, value))}"[:200]
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    short = isinstance(value, int) and value.bit_length() <= 128  # Python prints no huge ones
    if value is None or short or isinstance(value, float | str):
        return f"{value!r:.80}"
    return f"something else ({type(value).__name__})"


def _whole(highest: int) -> Reader:
    def read(name: str, value: Any) -> int:
        holds = type(value) is int and 0 <= value <= highest
        require(holds, name, f"be a whole number from 0 to {highest}", brief(value), UNDAMAGED)
        return int(value)

    return read


def _finite(name: str, value: Any) -> float:
    holds = type(value) is float and math.isfinite(value)
    require(holds, name, "be a finite float", brief(value), UNDAMAGED)
    return float(value)


def _array(dtype: DTypeLike, length: int | None = None) -> Reader:
    def read(name: str, value: Any) -> np.ndarray[Any, Any]:
        holds = isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == 1
        holds = holds and length in (None, value.size)
        size = "" if length is None else f" with shape ({length},)"
        rule = f"be a flat array of {np.dtype(dtype)}{size}"
        require(holds, name, rule, brief(value), UNDAMAGED)
        return np.asarray(value)

    return read


def _optional(read_some: Reader) -> Reader:
    return lambda name, value: None if value is None else read_some(name, value)


def _each(read_one: Reader) -> Reader:
    def read(name: str, value: Any) -> list[Any]:
        require(isinstance(value, list), name, "be a list", brief(value), UNDAMAGED)
        return [read_one(f"{name}[{index}]", item) for index, item in enumerate(value)]

    return read


def _named(read_one: Reader) -> Reader:
    def read(name: str, value: Any) -> dict[str, Any]:
        holds = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        require(holds, name, "be a dict of names", brief(value), UNDAMAGED)
        return {key: read_one(f"{name}[{key!r}]", item) for key, item in value.items()}

    return read


def _record(**readers: Reader) -> Reader:
    def read(name: str, value: Any) -> dict[str, Any]:
        holds = isinstance(value, Mapping) and value.keys() == readers.keys()
        require(holds, name, f"have the keys {', '.join(readers)}", brief(value), UNDAMAGED)
        return {key: read(f"{name}[{key!r}]", value[key]) for key, read in readers.items()}

    return read


_MT19937 = {"key": _array(np.uint32, 624), "pos": _whole(624)}
_PCG64 = _record(state=_whole((1 << 128) - 1), inc=_whole((1 << 128) - 1))
_HALF_DRAW = {"has_uint32": _whole(1), "uinteger": _whole((1 << 32) - 1)}

_BIT_GENERATORS: Mapping[str, Mapping[str, Reader]] = {
    "MT19937": {"state": _record(**_MT19937)},
    "PCG64": {"state": _PCG64, **_HALF_DRAW},
    "PCG64DXSM": {"state": _PCG64, **_HALF_DRAW},
    "Philox": {
        "state": _record(counter=_array(np.uint64, 4), key=_array(np.uint64, 2)),
        "buffer": _array(np.uint64, 4),
        "buffer_pos": _whole(4),
        **_HALF_DRAW,
    },
    "SFC64": {"state": _record(state=_array(np.uint64, 4)), **_HALF_DRAW},
}
_KIND_RULE = f"be one of {', '.join(_BIT_GENERATORS)}"


def _bit_generator(**more: Reader) -> Reader:
    """Return a reader for a bit generator's state, whose keys depend on its kind, plus ``more``."""

    def read(name: str, value: Any) -> Any:
        kind: Any = value.get("bit_generator") if isinstance(value, Mapping) else value
        known = isinstance(kind, str) and kind in _BIT_GENERATORS
        require(known, f"the bit generator of {name}", _KIND_RULE, brief(kind), UNDAMAGED)
        parts = _BIT_GENERATORS[kind]
        return _record(bit_generator=lambda _, same: same, **parts, **more)(name, value)

    return read


def _torch(name: str, value: Any) -> dict[str, Any]:
    """Read torch's streams; older checkpoints do not say which device was in use."""
    readers: dict[str, Reader] = {"cpu": _array(np.uint8), "cuda": _each(_array(np.uint8))}
    if isinstance(value, Mapping) and "device" in value:
        cuda = value.get("cuda")
        readers["device"] = _whole(len(cuda) - 1 if isinstance(cuda, list) else 0)
    read: dict[str, Any] = _record(**readers)(name, value)
    return read


read_state: Reader = _record(
    python=_record(**_MT19937, gauss_next=_optional(_finite)),
    numpy=_bit_generator(has_gauss=_whole(1), gauss=_finite),
    generators=_named(_bit_generator()),
    torch=_optional(_torch),
    cupy=_optional(_record(seed=_whole((1 << 64) - 1))),
)
"""Reads a rank's whole state."""


def require_kind(
    name: str, bit_generator: np.random.BitGenerator, saved: Mapping[str, Any] | None = None
) -> None:
    """Refuse a bit generator that is not NumPy's own, or not of the kind that was ``saved``.

    Raises:
        CheckpointError: It is of another kind.
    """
    kind = type(bit_generator).__name__
    own = kind in _BIT_GENERATORS and type(bit_generator) is getattr(np.random, kind)
    rule, remedy = f"{_KIND_RULE} of NumPy's", "Use np.random.default_rng"
    require(own, f"the bit generator of {name}", rule, type(bit_generator), remedy)
    if saved is not None:
        rule, remedy = f"be {saved['bit_generator']}, as it was saved", "Use the same kind again"
        require(kind == saved["bit_generator"], f"the bit generator of {name}", rule, kind, remedy)
