"""What a finding is."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"  # training works, but could do better
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """What some facts mean.

    Attributes:
        level: How bad it is.
        topic: What it is about.
        text: A sentence, and a remedy where one is needed.
    """

    level: Level
    topic: str
    text: str
