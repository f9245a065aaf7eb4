"""Options of cases: dataclasses whose fields become options of the command line."""

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def option(
    default: Any, text: str, *, kind: Any = None, choices: Sequence[Any] | None = None
) -> Any:
    """Declare a field of a dataclass of options.

    Args:
        default: Its value unless given; a tuple makes an option that takes several values.
        text: What it is, for ``--help``.
        kind: Makes a value from the word given; None takes the type of the default.
        choices: The values allowed.
    """
    sample = default[0] if isinstance(default, tuple) and default else default
    if kind is None:
        kind = str if sample in (None, ()) else type(sample)
    metadata = {"text": text, "kind": kind, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def add_options(parser: argparse.ArgumentParser, kinds: Mapping[str, type[Any]]) -> None:
    """Add the options of several cases to a parser, each option once.

    Args:
        parser: Where they go.
        kinds: The dataclass of options of each case, by its name.
    """
    fields: dict[str, dict[str, dataclasses.Field[Any]]] = {}
    for case, kind in kinds.items():
        for field in dataclasses.fields(kind):
            fields.setdefault(field.name, {})[case] = field
    for name, by_case in fields.items():
        field = next(iter(by_case.values()))
        several: dict[str, Any] = {}
        if isinstance(field.default, tuple):
            several = {"nargs": "*", "action": "extend"}
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=field.metadata["kind"],
            choices=field.metadata["choices"],
            help=_help(by_case, len(kinds)),
            **several,
        )


def parse_job(description: str | None, case: str, kind: type[Any]) -> tuple[Any, Path]:
    """Parse the arguments of the ranks' side of a case that starts jobs.

    Args:
        description: What it measures.
        case: Its name.
        kind: The dataclass of the options.

    Returns:
        The options, and the folder for the result.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, help="folder for the result")
    add_options(parser, {case: kind})
    arguments = parser.parse_args()
    return read_options(kind, arguments), arguments.out


def read_options(kind: type[Any], arguments: argparse.Namespace) -> Any:
    """Make a case's options from what was parsed; what was not given has its default."""
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)}
    return kind(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        }
    )


def _help(by_case: Mapping[str, dataclasses.Field[Any]], num_cases: int) -> str:
    texts = dict.fromkeys(field.metadata["text"] for field in by_case.values())
    defaults = {case: _words(field.default) for case, field in by_case.items()}
    if len(set(defaults.values())) == 1:
        default = next(iter(defaults.values()))
        only = "" if len(by_case) == num_cases else f"{', '.join(by_case)}: "
    else:
        only = ""
        default = ", ".join(f"{case}: {words}" for case, words in defaults.items())
    text = f"{only}{'; '.join(texts)}{f' ({default})' if default else ''}"
    return text.replace("%", "%%")


def _words(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(_words, default))
    if isinstance(default, int) and default >= 1 << 20 and default % (1 << 20) == 0:
        return f"{default >> 20} Mi"
    return "" if default is None else str(default)


def nbytes_of(text: str) -> int:
    """Read a number of bytes, for example ``1GiB``, in whole pages."""
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    for unit, factor in units.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor) // 4096 * 4096
    return int(text) // 4096 * 4096


def words_of(options: Any, names: Iterable[str]) -> list[str]:
    """Return the words that pass options on to another process, leaving out those that are None."""
    values = {name: getattr(options, name) for name in names}
    return [
        f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None
    ]
