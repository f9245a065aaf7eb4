"""A directory of checkpoints: which steps there are, and which may go."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from shardopt.checkpoint.format.manifest import MANIFEST_NAME

STEP_NAME = re.compile(r"step-(\d{12,19})(?:\.(\d{1,9}))?")


class StepFolder(NamedTuple):
    """A committed checkpoint. In order of age: by step, then by how often the step was saved.

    Attributes:
        step: Of the training run.
        repeat: 0 for the first checkpoint of the step.
        path: Its folder.
    """

    step: int
    repeat: int
    path: Path


def step_names(step: int) -> Iterator[str]:
    """Give the names that checkpoints of a step have, one after another."""
    name = f"step-{step:012d}"
    return itertools.chain([name], (f"{name}.{repeat}" for repeat in range(1, 10**9)))


def list_checkpoints(directory: Path, stripped: bool = False) -> list[StepFolder]:
    """Find the checkpoints of a directory, oldest step first; none if there is no directory.

    Args:
        directory: Where to look.
        stripped: Give also those that have lost their manifest.

    Raises:
        OSError: The directory cannot be read.
    """
    found = []
    for path in directory.iterdir() if directory.exists() else ():
        match = STEP_NAME.fullmatch(path.name)
        if match and path.is_dir() and (stripped or (path / MANIFEST_NAME).exists()):
            found.append(StepFolder(int(match[1]), int(match[2] or 0), path))
        elif match and not os.path.lexists(path):
            return list_checkpoints(directory, stripped)  # removed just now, for one unknown yet
    return sorted(found)


def superfluous(
    folders: Sequence[StepFolder], keep_last: int, keep: Iterable[Path] = ()
) -> list[StepFolder]:
    """Give those that may be removed.

    Args:
        folders: Oldest first.
        keep_last: So many of the last stay.
        keep: These stay as well.
    """
    kept = set(keep)
    return [
        folder for folder in folders[: max(0, len(folders) - keep_last)] if folder.path not in kept
    ]
