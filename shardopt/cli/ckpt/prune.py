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
    """What is to go, and why."""

    path: Path
    nbytes: int
    reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="directory of a Checkpointer")
    add("--keep-last", type=int, metavar="N", help="keep the last N that are intact")
    add("--after", type=int, metavar="STEP", help="remove those of later steps, to go back to STEP")
    add("--quick", action="store_true", help="tell by sizes, without reading, what is intact")
    add("--dry-run", action="store_true", help="only say what would go")
    add("--json", action="store_true", help="print an object")


def run(options: argparse.Namespace) -> int:
    """Remove checkpoints."""
    directory: Path = options.directory
    _check(options)
    folders = [f for f in list_checkpoints(directory) if not f.path.is_symlink()]
    abandoned = disk.leftovers(directory)
    if not folders and not abandoned:
        raise CheckpointError(
            f"DIR must hold checkpoints named step-...; got {str(directory)!r}, without any. Pass "
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
            f"DIR must be a directory of checkpoints; got {str(options.directory)!r}. Look for it "
            "with: shardopt ckpt ls."
        )
    if options.keep_last is None and options.after is None:
        raise CheckpointError(
            "what to keep must be said; got neither --keep-last nor --after. Add --keep-last 3, "
            "say."
        )
    if options.keep_last is not None and options.keep_last < 1:
        raise CheckpointError(
            f"--keep-last must be at least 1; got {options.keep_last}. Remove the directory itself "
            "if nothing is wanted."
        )


def _choose(options: argparse.Namespace, folders: Sequence[StepFolder]) -> list[Removal]:
    """Say which checkpoints are to go, given the oldest first."""
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
            f"--after must leave a checkpoint that is intact; got {after}, which leaves none. "
            "Choose a later step: shardopt ckpt verify."
        )
    if intact == keep_last:
        # What is older than those kept goes, damaged or not.
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
    summary="remove older checkpoints, and what dead jobs have left",
    details=(
        "Asks nothing: look at what --dry-run says first. What is to be kept is read and verified\n"
        "before anything goes: --keep-last counts intact checkpoints only, so that the newest of\n"
        "them always stays. --after removes newer ones, to let a run go back on purpose. Both go\n"
        "by the names step-000000012000, and leave folders with other names, and links, alone."
    ),
    example="shardopt ckpt prune runs/7b --keep-last 3 --dry-run",
    exit_codes=("removed, or nothing to remove", "never"),
    add_arguments=add_arguments,
    run=run,
)
