"""The checkpoints at a path and their state, as far as it shows without reading data."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardopt.checkpoint.format.directory import STEP_NAME
from shardopt.checkpoint.format.disk import REMOVED_PREFIX, UNFINISHED_PREFIX
from shardopt.checkpoint.format.manifest import MANIFEST_NAME, Manifest
from shardopt.checkpoint.format.reader import Reader, read_manifest
from shardopt.errors import CheckpointError

COMPLETE, DAMAGED, UNFINISHED, REMOVED = "complete", "damaged", "unfinished", "removed"

_FILE_SUFFIX = ".safetensors"
_FILE_PREFIX = "rank-"


@dataclass(frozen=True)
class Summary:
    """A checkpoint, whether it is whole or not.

    Attributes:
        path: Its folder.
        state: COMPLETE, DAMAGED, UNFINISHED (never committed) or REMOVED (partly).
        problems: Descriptions of the damage.
        step: Its step by the manifest, or else by the folder's name.
        nbytes: Size of the files that exist, in bytes.
        created: The time it was saved, by the manifest.
        world_size: Number of ranks that saved it.
        num_params: Number of parameters.
        numel: Elements of all parameters.
    """

    path: Path
    state: str
    problems: tuple[str, ...]
    step: int | None
    nbytes: int
    created: str = ""
    world_size: int | None = None
    num_params: int | None = None
    numel: int | None = None

    @property
    def age(self) -> tuple[int, str, str]:
        """A sort key that puts the newest last."""
        return (-1 if self.step is None else self.step, self.created, self.path.name)


def find(path: Path) -> list[Path]:
    """Find the checkpoints at a path: the path itself, or those in the directory.

    Raises:
        CheckpointError: The path is not a folder.
    """
    if not path.is_dir():
        got = "is not a folder" if path.exists() else "does not exist"
        raise CheckpointError(
            f"path must be a checkpoint or a directory of them; got {str(path)!r}, which {got}. "
            "Pass the directory that checkpoints were saved to."
        )
    if _looks_like_one(path.absolute()):
        return [path]
    return [child for child in sorted(path.iterdir()) if child.is_dir() and _looks_like_one(child)]


def find_all(paths: Sequence[Path], leftovers: bool = True) -> list[Path]:
    """Find the checkpoints at several paths.

    Args:
        paths: Checkpoints, or directories of them.
        leftovers: Include a directory's unfinished and partly removed checkpoints.

    Raises:
        CheckpointError: There is no checkpoint.
    """
    found = [
        folder
        for path in paths
        for folder in find(path)
        if leftovers or folder == path or not is_leftover(folder)
    ]
    if not found:
        raise CheckpointError(
            f"path must hold a checkpoint; got {', '.join(map(repr, map(str, paths)))} without "
            "any. Pass the directory that checkpoints were saved to."
        )
    return found


def require_one(path: Path) -> Path:
    """Return a path after checking that it is a single checkpoint.

    Raises:
        CheckpointError: It is not.
    """
    found = find_all([path])
    if found != [path]:
        raise CheckpointError(
            f"path must be one checkpoint; got {str(path)!r}, a directory of {len(found)}. Choose "
            f"one of them, for example {found[-1]}."
        )
    return path


def is_leftover(folder: Path) -> bool:
    """Return whether a folder's name marks it as unfinished or partly removed."""
    return folder.absolute().name.startswith((UNFINISHED_PREFIX, REMOVED_PREFIX))


def summarize(folder: Path) -> Summary:
    """Summarize a checkpoint without reading its data."""
    step, nbytes = _named_step(folder), folder_nbytes(folder)
    if is_leftover(folder):
        removed = folder.absolute().name.startswith(REMOVED_PREFIX)
        return Summary(folder, REMOVED if removed else UNFINISHED, (), step, nbytes)
    try:
        manifest = read_manifest(folder)
    except (CheckpointError, OSError) as error:
        return Summary(folder, DAMAGED, (str(error),), step, nbytes)
    problems = file_problems(folder, manifest)
    return Summary(
        folder,
        DAMAGED if problems else COMPLETE,
        problems,
        manifest.step,
        nbytes,
        manifest.created,
        manifest.world_size,
        len(manifest.params),
        manifest.param_numel,
    )


def file_problems(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """Describe the files that are missing, of the wrong size, or surplus."""
    with Reader(folder, manifest) as reader:
        return tuple(map(str, reader.file_problems()))


def folder_nbytes(folder: Path) -> int:
    """Return the size of all files below a folder in bytes, as far as they are accessible."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # it is being removed
                continue
    return total


def _looks_like_one(folder: Path) -> bool:
    if is_leftover(folder) or STEP_NAME.fullmatch(folder.name):
        return True
    try:
        with os.scandir(folder) as entries:
            return any(
                entry.name == MANIFEST_NAME
                or (entry.name.startswith(_FILE_PREFIX) and entry.name.endswith(_FILE_SUFFIX))
                for entry in entries
            )
    except OSError:
        return False


def _named_step(folder: Path) -> int | None:
    match = STEP_NAME.search(folder.absolute().name)
    return int(match[1]) if match else None
