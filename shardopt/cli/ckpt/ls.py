"""``shardopt ckpt ls``."""

import argparse
from dataclasses import asdict
from pathlib import Path

from shardopt.cli import text
from shardopt.cli.base import Command, Exit
from shardopt.cli.ckpt.find import DAMAGED, Summary, find_all, summarize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="DIR", help="directory of checkpoints"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of objects")


def run(options: argparse.Namespace) -> int:
    """List checkpoints."""
    found = sorted(map(summarize, find_all(options.paths)), key=lambda summary: summary.age)
    if options.json:
        text.print_json([asdict(summary) | {"path": str(summary.path)} for summary in found])
    else:
        heads = (">step", ">ranks", ">parameters", ">size", "saved", "checkpoint", "state")
        print(text.table(heads, map(_row, found)))
    return Exit.PROBLEMS if any(s.state == DAMAGED for s in found) else Exit.FINE


def _row(summary: Summary) -> tuple[str, ...]:
    state = summary.state
    if summary.problems:
        more = len(summary.problems) - 1
        state += f": {summary.problems[0]}" + (f" And {more} more." if more else "")
    return (
        _known(summary.step),
        _known(summary.world_size),
        "-" if summary.numel is None else text.number(summary.numel),
        text.nbytes(summary.nbytes),
        text.when(summary.created) if summary.created else "-",
        str(summary.path),
        state,
    )


def _known(value: int | None) -> str:
    return "-" if value is None else str(value)


COMMAND = Command(
    name="ls",
    summary="list checkpoints, the newest last",
    details=(
        "Checks sizes, not data: 'complete' means that all files are there. What a killed job\n"
        "left behind is 'unfinished' or partly 'removed'; 'prune' deletes it."
    ),
    example="shardopt ckpt ls runs/7b",
    exit_codes=("none is damaged", "at least one is damaged; see 'state'"),
    add_arguments=add_arguments,
    run=run,
)
