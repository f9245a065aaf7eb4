"""A directory of checkpoints: which there are, and which may be removed."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from shardopt.checkpoint.format.manifest import MANIFEST_NAME

STEP_NAME = re.compile(r"step-(\d{12,19})(?:\.(\d{1,9}))?")


class StepFolder(NamedTuple):
    """A committed checkpoint. Sorts by step, then by how often the step has been saved.

    Attributes:
        step: The step of the training run.
        repeat: 0 for the first checkpoint of the step, then 1, 2 ...
        path: The folder.
    """

    step: int
    repeat: int
    path: Path


class StepNames:
    """The names of checkpoints of a step: ``step-000000001200``, ``step-000000001200.1`` ...

    Args:
        step: The step of the training run; looked at when names are asked for.
    """

    def __init__(self, step: int) -> None:
        self._step = step

    def __iter__(self) -> Iterator[str]:
        name = f"step-{self._step:012d}"
        yield name
        for repeat in range(1, 10**9):
            yield f"{name}.{repeat}"


def list_checkpoints(directory: Path, stripped: bool = False) -> list[StepFolder]:
    """Find the checkpoints of a directory, oldest step first; none if there is no directory.

    Args:
        directory: The directory.
        stripped: Include those that have lost their manifest.

    Raises:
        OSError: The directory cannot be read.
    """
    found = []
    for path in directory.iterdir() if directory.exists() else ():
        match = STEP_NAME.fullmatch(path.name)
        if match and path.is_dir() and (stripped or (path / MANIFEST_NAME).exists()):
            found.append(StepFolder(int(match[1]), int(match[2] or 0), path))
        elif match and not os.path.lexists(path):
            return list_checkpoints(directory, stripped)  # it has just been replaced by a newer one
    return sorted(found)


def removable(
    folders: Sequence[StepFolder], keep_last: int, keep: Iterable[Path] = ()
) -> list[StepFolder]:
    """Return the checkpoints that may be removed.

    Args:
        folders: All checkpoints, oldest first.
        keep_last: Number of checkpoints to keep, from the end.
        keep: Checkpoints to keep in any case.
    """
    kept = set(keep)
    return [
        folder for folder in folders[: max(0, len(folders) - keep_last)] if folder.path not in kept
    ]
