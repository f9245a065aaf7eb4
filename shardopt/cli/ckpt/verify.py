"""``shardopt ckpt verify``."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shardopt.cli import text
from shardopt.cli.base import Command, Exit
from shardopt.cli.ckpt.checking import Defect, check
from shardopt.cli.ckpt.find import find_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    path_help = "checkpoint, or a directory of checkpoints"
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help=path_help)
    parser.add_argument(
        "--quick", action="store_true", help="check manifest and file sizes, but no data"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of objects")


def run(options: argparse.Namespace) -> int:
    """Verify checkpoints."""
    results = []
    for folder in find_all(options.paths, leftovers=False):
        manifest, defects = check(folder, options.quick)
        nbytes = manifest.nbytes if manifest else 0
        results.append(
            {
                "path": str(folder),
                "intact": not defects,
                "data_read": not options.quick,
                "nbytes": nbytes,
                "findings": list(map(asdict, defects)),
            }
        )
        if not options.json:
            _report(folder, nbytes, defects, options.quick)
    if options.json:
        text.print_json(results)
    return Exit.FINE if all(result["intact"] for result in results) else Exit.PROBLEMS


def _report(folder: Path, nbytes: int, defects: Sequence[Defect], quick: bool) -> None:
    if not defects:
        how = "sizes are right" if quick else "every byte is what was written"
        print(text.printable(f"{folder}: intact, {text.nbytes(nbytes)}, {how}"))
        return
    print(text.printable(f"{folder}: damaged"))
    for defect in defects:
        tensors = f": {text.some(defect.tensors)}" if defect.tensors else ""
        print(text.printable(f"  {defect.problem}{tensors}"))


COMMAND = Command(
    name="verify",
    summary="read checkpoints and find all damage",
    details=(
        "Reads and hashes every byte. Reports each damaged chunk (of 1 MiB) with the tensors in\n"
        "it, files that are missing, truncated or surplus, and headers that contradict the\n"
        "manifest."
    ),
    example="shardopt ckpt verify runs/7b",
    exit_codes=("all are intact", "at least one is damaged"),
    add_arguments=add_arguments,
    run=run,
)
