"""``shardopt ckpt prune``."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardopt.checkpoint.format import disk
from shardopt.checkpoint.format.directory import StepFolder, list_checkpoints
from shardopt.cli import text
from shardopt.cli.base import Command, Exit
from shardopt.cli.ckpt.checking import check
from shardopt.cli.ckpt.find import folder_nbytes
from shardopt.errors import CheckpointError


@dataclass(frozen=True)
class Removal:
    """A folder to remove, and the reason."""

    path: Path
    nbytes: int
    reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="directory of a Checkpointer")
    add("--keep-last", type=int, metavar="N", help="keep the last N intact checkpoints")
    add(
        "--after",
        type=int,
        metavar="STEP",
        help="remove checkpoints of later steps, to go back to STEP",
    )
    add("--quick", action="store_true", help="judge by file sizes, without reading data")
    add("--dry-run", action="store_true", help="only print what would be removed")
    add("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Remove checkpoints."""
    directory: Path = options.directory
    _check(options)
    folders = [f for f in list_checkpoints(directory) if not f.path.is_symlink()]
    abandoned = disk.stale_folders(directory)
    if not folders and not abandoned:
        raise CheckpointError(
            f"DIR must hold checkpoints named step-...; got {str(directory)!r} without any. Pass "
            "the directory of a Checkpointer."
        )
    removals = _choose(options, folders)
    removals += [Removal(p, folder_nbytes(p), "left by a dead job") for p in abandoned]
    for removal in removals:
        if not options.dry_run:
            disk.discard(removal.path) if removal.path in abandoned else disk.remove(removal.path)
        if not options.json:
            verb = "would remove" if options.dry_run else "removed"
            told = f"{verb} {removal.path}, {text.nbytes(removal.nbytes)}, {removal.reason}"
            print(text.printable(told))
    _report(options, removals, len(folders))
    return Exit.FINE


def _check(options: argparse.Namespace) -> None:
    if not options.directory.is_dir():
        raise CheckpointError(
            f"DIR must be a directory of checkpoints; got {str(options.directory)!r}. Find one "
            "with: shardopt ckpt ls."
        )
    if options.keep_last is None and options.after is None:
        raise CheckpointError(
            "--keep-last or --after must be given; got neither. Add, for example, --keep-last 3."
        )
    if options.keep_last is not None and options.keep_last < 1:
        raise CheckpointError(
            f"--keep-last must be at least 1; got {options.keep_last}. To keep none, remove the "
            "directory itself."
        )


def _choose(options: argparse.Namespace, folders: Sequence[StepFolder]) -> list[Removal]:
    """Choose the checkpoints to remove, given the oldest first."""
    keep_last, after = options.keep_last, options.after
    stay = [folder for folder in folders if after is None or folder.step <= after]
    removals = [_removal(folder, f"after step {after}") for folder in folders[len(stay) :]]
    if not removals and (keep_last is None or len(stay) <= keep_last):
        return []
    kept, intact = len(stay), 0
    while kept and intact < (keep_last or 1):
        kept -= 1
        intact += not check(stay[kept].path, options.quick)[1]
    if removals and not intact:
        raise CheckpointError(
            f"--after must leave an intact checkpoint; got {after}, which leaves none. Choose a "
            "later step with: shardopt ckpt verify."
        )
    if intact == keep_last:
        # Everything older than those is removed, damaged or not.
        removals += [_removal(folder, "superseded") for folder in stay[:kept]]
    return removals


def _removal(folder: StepFolder, reason: str) -> Removal:
    return Removal(folder.path, folder_nbytes(folder.path), reason)


def _report(options: argparse.Namespace, removals: Sequence[Removal], num_folders: int) -> None:
    total = sum(removal.nbytes for removal in removals)
    if options.json:
        removed = [{"path": str(r.path), "nbytes": r.nbytes, "reason": r.reason} for r in removals]
        text.print_json({"dry_run": options.dry_run, "removed": removed, "nbytes": total})
        return
    verb = "would be free" if options.dry_run else "are free now"
    gone = sum(removal.reason != "left by a dead job" for removal in removals)
    print(f"{text.nbytes(total)} {verb}; checkpoints that stay: {num_folders - gone}")


COMMAND = Command(
    name="prune",
    summary="remove old checkpoints and what dead jobs left behind",
    details=(
        "Removes without asking, so try --dry-run first. Checkpoints to keep are read and\n"
        "verified before anything is removed: --keep-last counts only intact ones, so the newest\n"
        "intact one always stays. --after removes newer ones, to take a run back to an earlier\n"
        "step. Both go by names like step-000000012000, and never touch other folders or links."
    ),
    example="shardopt ckpt prune runs/7b --keep-last 3 --dry-run",
    exit_codes=("removed, or nothing to remove", "never used"),
    add_arguments=add_arguments,
    run=run,
)
