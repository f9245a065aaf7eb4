"""Text for people and JSON for programs. Text from files is escaped before it is printed."""

import io
import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

WIDTH = 100
"""Of reports, in characters."""

Rows = Sequence[tuple[str, ...]]


def printable(text: str) -> str:
    """Escape characters that control a terminal or cannot be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format rows as aligned columns; those whose head begins with ``>`` are right-aligned."""
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


def titled_table(title: str, heads: Sequence[str], rows: Rows) -> str:
    """Format rows under a title, by rich if it is installed; see ``table`` for the heads."""
    try:
        from rich import box  # an extra, and slow to load
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return f"{title}\n{table(heads, rows)}"
    made: Any = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        justify = "right" if head.startswith(">") else "left"
        made.add_column(head.lstrip(">"), justify=justify, no_wrap=True)
    for row in rows:
        made.add_row(*map(printable, row))
    out = io.StringIO()
    Console(file=out, width=WIDTH, highlight=False, markup=False).print(made)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def fields(pairs: Iterable[tuple[str, str]]) -> str:
    """Format names and values, one pair per line."""
    found = [(printable(name), printable(value)) for name, value in pairs]
    width = max((len(name) for name, _ in found), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in found)


def some(names: Sequence[str], limit: int = 8) -> str:
    """List the first few of many names, and count the others."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def number(value: int, unit: str = "") -> str:
    """Format a large number with three digits: ``1.24 G``."""
    scaled, prefixes = float(value), ["", "k", "M", "G", "T", "P", "E"]
    while scaled >= 999.5 and len(prefixes) > 1:
        scaled /= 1000
        prefixes.pop(0)
    digits = 0 if not prefixes[0] or scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f} {prefixes[0]}{unit}".rstrip()


def nbytes(value: int) -> str:
    """Format a size in bytes."""
    return number(value, "B")


def rate(nbytes_per_s: float) -> str:
    """Format a bandwidth."""
    return number(round(nbytes_per_s), "B/s")


def seconds(value: float) -> str:
    """Format a duration with three digits: ``1.24 ms``."""
    scaled, units = value, ["s", "ms", "us"]
    while scaled < 0.9995 and len(units) > 1:
        scaled *= 1000
        units.pop(0)
    digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f} {units[0]}"


def ranges(numbers: Iterable[int]) -> str:
    """Format integers, consecutive ones as a range: ``0-3``."""
    runs: list[list[int]] = []
    for value in sorted(numbers):
        if runs and value == runs[-1][-1] + 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ",".join("-".join(map(str, run)) for run in runs)


def clip(text: str, length: int) -> str:
    """Shorten a text to a length, and mark it as shortened."""
    return text if len(text) <= length else f"{text[: length - 2]}.."


def when(text: str) -> str:
    """Format the time in a manifest, or return ``?`` if it is invalid."""
    try:
        return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
    except (ValueError, OverflowError):
        return "?"


def print_json(value: Any) -> None:
    """Print a value as JSON, with infinities, NaN and unknown objects as strings."""
    print(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)
