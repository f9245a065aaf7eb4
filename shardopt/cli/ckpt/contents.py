"""The values of ``extra`` and the param groups, with arrays shown by dtype and shape only."""

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shardopt.checkpoint.format.manifest import ArrayEntry, Manifest
from shardopt.checkpoint.format.values import decode


@dataclass(frozen=True)
class StoredArray:
    """A placeholder for an array in a file."""

    file: int
    index: int
    entry: ArrayEntry

    @property
    def form(self) -> str:
        """Return a description of it, in words."""
        kind = "tensor" if self.entry.form else "array"
        return f"{kind}({self.entry.dtype}, {list(self.entry.shape)})"

    def __str__(self) -> str:
        return self.form

    __repr__ = __str__


def decode_values(manifest: Manifest, value: Any) -> Any:
    """Decode a value of a manifest without reading its arrays.

    Raises:
        DamagedCheckpointError: It is not a value that was saved.
    """

    def stand_in(file: int, index: int) -> StoredArray:
        return StoredArray(file, index, manifest.files[file].arrays[index])

    return decode(value, stand_in)


def decode_groups(manifest: Manifest) -> list[Any]:
    """Decode the hyperparameters of the param groups."""
    return [decode_values(manifest, group) for group in manifest.groups]


def decode_extra(manifest: Manifest) -> dict[str, Any]:
    """Decode ``extra``, with the ranks' values as a list ``per_rank``; empty if there is none."""
    extra = decode_values(manifest, manifest.extra["replicated"])
    per_rank = decode_values(manifest, manifest.extra["per_rank"])
    content = extra if isinstance(extra, dict) else {} if extra is None else {"extra": extra}
    return content if per_rank is None else {**content, "per_rank": per_rank}


def decode_model(manifest: Manifest) -> dict[str, Any]:
    """Decode the model's buffers and other values; those of rank 0, if ranks have their own."""
    model = manifest.model
    return (
        {}
        if model is None
        else {name: decode_values(manifest, value) for name, value in model.values_of(0).items()}
    )


def flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield nested values with their paths: ``extra['rng'][0]``, 5. Flat lists stay whole."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flatten(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple) and any(map(_is_nested, value)):
        for index, item in enumerate(value):
            yield from flatten(item, f"{name}[{index}]")
    else:
        yield name, value


def abbreviate(value: Any) -> str:
    """Format a value in one short line."""
    return _SHORT.repr(value)


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list | tuple | StoredArray)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 72
_SHORT.maxlong = 24
