"""Quantities as people write them: ``7e9``, ``200Gbit``, ``400GB/s``, ``5us``."""

import math
import re

from shardopt.errors import PlanError

_WORD = re.compile(r"\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(\S*)\s*")
_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_PREFIXES |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
_SECONDS |= {"d": 86400.0, "y": 365.25 * 86400.0}
_NBYTES = {f"{prefix}B": factor for prefix, factor in _PREFIXES.items()}
_RATES = {f"{unit}/s": factor for unit, factor in _NBYTES.items()}
for _prefix, _factor in _PREFIXES.items():
    _RATES |= {f"{_prefix}bit": _factor / 8, f"{_prefix}bit/s": _factor / 8}
_COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def parse_rate(name: str, word: str) -> float:
    """Return bytes/s from ``200Gbit``, ``25GB/s`` and the like.

    Args:
        name: The quantity, for messages.
        word: As it was written.

    Raises:
        PlanError: It is not a rate > 0.
    """
    return _parse(name, word, _RATES, "bytes or bits per second > 0, such as 400GB/s or 200Gbit")


def parse_seconds(name: str, word: str) -> float:
    """Return seconds from ``5us``, ``1.5ms``, ``30d`` and the like; as ``parse_rate``."""
    return _parse(name, word, _SECONDS, "a time > 0 with its unit, such as 5us, 1.5s, 6h or 30d")


def parse_nbytes(name: str, word: str) -> int:
    """Return bytes from ``4MiB``, ``80GB`` and the like; as ``parse_rate``."""
    return _whole(name, word, _NBYTES, "bytes > 0 with their unit, such as 4MiB or 80GB")


def parse_count(name: str, word: str) -> int:
    """Return a whole number from ``7e9``, ``7B``, ``350M`` and the like; as ``parse_rate``."""
    return _whole(name, word, _COUNTS, "a whole number > 0, such as 7e9 or 350M")


def _whole(name: str, word: str, units: dict[str, float], rule: str) -> int:
    value = _parse(name, word, units, rule)
    if value != int(value):
        raise _wrong(name, word, rule)
    return int(value)


def _parse(name: str, word: str, units: dict[str, float], rule: str) -> float:
    found = _WORD.fullmatch(word)
    try:
        value = float(found[1]) * units[found[2]] if found else math.nan
    except (KeyError, ValueError):
        value = math.nan
    if not 0 < value < math.inf:
        raise _wrong(name, word, rule)
    return value


def _wrong(name: str, word: str, rule: str) -> PlanError:
    return PlanError(f"{name} must be {rule}; got {word!r}. Write the number and its unit.")
