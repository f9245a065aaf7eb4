"""The findings of an examination."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """The severity of a finding."""

    OK = "ok"
    NOTE = "note"  # training works, but could be faster
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """A conclusion from the facts about a job.

    Attributes:
        level: Its severity.
        topic: The part of the job that it is about.
        text: A sentence, followed by a remedy if one is needed.
    """

    level: Level
    topic: str
    text: str
