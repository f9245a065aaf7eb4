"""``shardopt ckpt verify``."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shardopt.cli import text
from shardopt.cli.base import Command, Exit
from shardopt.cli.ckpt.checking import Finding, check
from shardopt.cli.ckpt.find import find_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    path_help = "checkpoint, or a directory: all that it holds"
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help=path_help)
    parser.add_argument("--quick", action="store_true", help="manifest and sizes only, no data")
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def run(options: argparse.Namespace) -> int:
    """Verify checkpoints."""
    results = []
    for folder in find_all(options.paths, leftovers=False):
        manifest, findings = check(folder, options.quick)
        nbytes = manifest.nbytes if manifest else 0
        results.append(
            {
                "path": str(folder),
                "intact": not findings,
                "data_read": not options.quick,
                "nbytes": nbytes,
                "findings": list(map(asdict, findings)),
            }
        )
        if not options.json:
            _report(folder, nbytes, findings, options.quick)
    if options.json:
        text.print_json(results)
    return Exit.FINE if all(result["intact"] for result in results) else Exit.PROBLEMS


def _report(folder: Path, nbytes: int, findings: Sequence[Finding], quick: bool) -> None:
    if not findings:
        how = "sizes are right" if quick else "every byte is what was written"
        print(text.printable(f"{folder}: intact, {text.nbytes(nbytes)}, {how}"))
        return
    print(text.printable(f"{folder}: damaged"))
    for finding in findings:
        tensors = f": {text.some(finding.tensors)}" if finding.tensors else ""
        print(text.printable(f"  {finding.problem}{tensors}"))


COMMAND = Command(
    name="verify",
    summary="read checkpoints, and find all that is damaged",
    details=(
        "Every byte is read and hashed. Each damaged chunk (of 1 MiB) is named, with what is in\n"
        "it; so are files that are missing, truncated or surplus, and headers that contradict\n"
        "the manifest."
    ),
    example="shardopt ckpt verify runs/7b",
    exit_codes=("all are intact", "one is damaged"),
    add_arguments=add_arguments,
    run=run,
)
