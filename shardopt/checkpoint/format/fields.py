"""Fields of JSON that is not trusted, each of which is checked as it is read."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from shardopt.checkpoint.format.messages import must
from shardopt.errors import CheckpointError, DamagedCheckpointError

MAX_INTEGER_BITS = 3300  # the state of a random generator has integers of 128 bits and more

_MAX_DIGITS = 1000  # enough for that many bits
_MAX_COUNT = 1 << 62
_MAX_DIMENSIONS = 64
_SHOWN_LENGTH = 80


def damaged(what: str, rule: str, got: object) -> DamagedCheckpointError:
    """Return the error for something in a checkpoint that is not what it must be."""
    try:
        plain = isinstance(got, str) and got != "" and got.isprintable()
        shown = str(got) if plain else repr(got)
    except RecursionError:
        shown = "something very deep"
    if len(shown) > _SHOWN_LENGTH:
        shown = shown[:_SHOWN_LENGTH] + "..."
    return DamagedCheckpointError(must(what, rule, shown, "Use another checkpoint"))


def parse_json(text: bytes, where: str) -> Any:
    """Parse JSON in which no key occurs twice and every number is finite.

    Raises:
        DamagedCheckpointError: The text is something else, or is nested too deeply.
    """

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ValueError(f"an integer of {len(digits)} digits")
        return int(digits)

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"the number {name}")

    def real(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits[:_SHOWN_LENGTH])

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("an object with a key twice")
        return result

    try:
        return json.loads(
            text.decode(),
            parse_int=integer,
            parse_float=real,
            parse_constant=refuse,
            object_pairs_hook=unique,
        )
    except (ValueError, RecursionError) as error:
        raise damaged(where, "be JSON of a checkpoint", str(error)) from None


class Fields:
    """A JSON object whose fields are checked as they are read.

    Every method raises ``DamagedCheckpointError``, which names the field, if the field is not what
    it must be.

    Attributes:
        where: A name for the object, for messages.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise damaged(where, "be an object", type(value).__name__)
        self.where = where
        self._value = value

    def get(self, name: str) -> Any:
        """Return any value."""
        if name not in self._value:
            raise damaged(self.where, f"have the field {name!r}", "none")
        return self._value[name]

    def has(self, name: str) -> bool:
        """Whether there is such a field, which earlier versions may not have written."""
        return name in self._value

    def text(self, name: str) -> str:
        """Return a string."""
        return str(self._typed(name, str, "a string"))

    def texts(self) -> dict[str, str]:
        """Return all fields, which must be strings."""
        return {name: self.text(name) for name in self._value}

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """Return a string, which must be one of ``choices``."""
        value = self.text(name)
        if value not in choices:
            raise damaged(f"{name} of {self.where}", f"be one of {', '.join(choices)}", value)
        return value

    def count(self, name: str) -> int:
        """Return a whole number in [0, 2**62]."""
        return self.counts([self.get(name)], f"{name} of {self.where}")[0]

    def number(self, name: str) -> float:
        """Return a finite number."""
        value = self.get(name)
        if type(value) not in (int, float) or abs(value) > _MAX_COUNT << _MAX_DIMENSIONS:
            raise damaged(f"{name} of {self.where}", "be a number", value)
        return float(value)

    def array(self, name: str) -> list[Any]:
        """Return a list."""
        return list(self._typed(name, list, "a list"))

    def object(self, name: str) -> "Fields":
        """Return an object."""
        return Fields(self.get(name), f"{name} of {self.where}")

    def pairs(self, name: str) -> dict[str, Any]:
        """Return a list of [text, value], each text once, as a dict."""
        return Fields.as_dict(self.get(name), f"{name} of {self.where}")

    @staticmethod
    def as_dict(value: Any, where: str) -> dict[str, Any]:
        """Return a list of [text, value], each text once, as a dict."""
        rule = "be a list of [text, value], each text once"
        if not isinstance(value, list):
            raise damaged(where, rule, type(value).__name__)
        result: dict[str, Any] = {}
        for pair in value:
            is_pair = isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is str
            if not is_pair or pair[0] in result:
                raise damaged(where, rule, pair)
            result[pair[0]] = pair[1]
        return result

    def objects(self, name: str) -> Iterator["Fields"]:
        """Yield the objects of a list."""
        for index, value in enumerate(self.array(name)):
            yield Fields(value, f"{name}[{index}] of {self.where}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a shape, the number of elements of which is at most 2**62."""
        shape = tuple(self.counts(self.get(name), f"{name} of {self.where}"))
        if len(shape) > _MAX_DIMENSIONS or math.prod(max(1, n) for n in shape) > _MAX_COUNT:
            raise damaged(f"{name} of {self.where}", "have fewer dimensions or elements", shape)
        return shape

    def require_version(self, expected_format: str, version: int) -> None:
        """Refuse what is not a checkpoint, and checkpoints that need a newer reader.

        Raises:
            CheckpointError: The checkpoint needs a newer reader.
        """
        if self.text("format") != expected_format:
            raise damaged(self.where, f"be of format {expected_format!r}", self.text("format"))
        needed = self.count("min_reader_version")
        if needed > version:
            rule = f"be of format version {version} or older"
            raise CheckpointError(must(self.where, rule, needed, "Install a newer shardopt"))

    @staticmethod
    def counts(value: Any, where: str) -> list[int]:
        """Return a list of whole numbers in [0, 2**62]."""
        if not isinstance(value, list):
            raise damaged(where, "be a list of whole numbers", type(value).__name__)
        for number in value:
            if type(number) is not int or not 0 <= number <= _MAX_COUNT:
                raise damaged(where, f"be whole numbers from 0 to {_MAX_COUNT}", number)
        return value

    def _typed(self, name: str, kind: type, words: str) -> Any:
        value = self.get(name)
        if type(value) is not kind:
            raise damaged(f"{name} of {self.where}", f"be {words}", type(value).__name__)
        return value
