"""Text for people, JSON for machines. What files say is not trusted to be fit for a terminal."""

import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any


def printable(text: str) -> str:
    """Escape what would do something to a terminal, or cannot be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Align columns; those whose heads begin with ``>`` to the right."""
    cells = [[head.lstrip(">") for head in heads], *([printable(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if head.startswith(">") else cell.ljust(width)
            for cell, width, head in zip(row, widths, heads, strict=True)
        ).rstrip()
        for row in cells
    )
    return "\n".join(lines)


def fields(pairs: Iterable[tuple[str, str]]) -> str:
    """Write names and values, one pair a line."""
    found = [(printable(name), printable(value)) for name, value in pairs]
    width = max((len(name) for name, _ in found), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in found)


def some(names: Sequence[str], limit: int = 8) -> str:
    """Name the first few of many."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def number(value: int, unit: str = "") -> str:
    """Write a large number with three digits: ``1.24 G``."""
    scaled, prefixes = float(value), ["", "k", "M", "G", "T", "P", "E"]
    while scaled >= 999.5 and len(prefixes) > 1:
        scaled /= 1000
        prefixes.pop(0)
    digits = 0 if not prefixes[0] or scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f} {prefixes[0]}{unit}".rstrip()


def nbytes(value: int) -> str:
    """Write a size."""
    return number(value, "B")


def rate(nbytes_per_s: float) -> str:
    """Write a bandwidth."""
    return number(round(nbytes_per_s), "B/s")


def seconds(value: float) -> str:
    """Write a time with three digits: ``1.24 ms``."""
    scaled, units = value, ["s", "ms", "us"]
    while scaled < 0.9995 and len(units) > 1:
        scaled *= 1000
        units.pop(0)
    digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f} {units[0]}"


def ranges(numbers: Iterable[int]) -> str:
    """Write whole numbers, those that follow each other as ``0-3``."""
    runs: list[list[int]] = []
    for value in sorted(numbers):
        if runs and value == runs[-1][-1] + 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ",".join("-".join(map(str, run)) for run in runs)


def clip(text: str, length: int) -> str:
    """Cut a text that is longer, and show that it was cut."""
    return text if len(text) <= length else f"{text[: length - 2]}.."


def when(text: str) -> str:
    """Write a manifest's time, or ``?`` where it is none."""
    try:
        return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
    except (ValueError, OverflowError):
        return "?"


def print_json(value: Any) -> None:
    """Print a value as JSON; infinite numbers and NaN as strings, other objects as their text."""
    print(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)
