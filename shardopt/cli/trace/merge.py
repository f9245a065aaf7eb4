"""``shardopt trace merge``."""

import argparse
import gzip
import json
import os
from pathlib import Path
from typing import IO

from shardopt.cli import text
from shardopt.cli.base import Command, Exit
from shardopt.cli.trace.reading import Run, add_run_argument, choose_run, time_ns
from shardopt.errors import TraceError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a trace")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="to write")
    add_run_argument(parser)
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")


def run(options: argparse.Namespace) -> int:
    """Merge the files of a run."""
    chosen, _, _ = choose_run(options.folder, options.number)
    num_events = merge(chosen, options.out, replace=options.force)
    size = text.nbytes(options.out.stat().st_size)
    print(f"{options.out}: {num_events} events of {len(chosen.ranks)} ranks, {size}")
    return Exit.FINE


def merge(run: Run, out: Path, *, replace: bool = False) -> int:
    """Write the events of all ranks into one file, by one clock that begins with the job.

    Args:
        run: The job.
        out: The file; compressed if its name ends with ``.gz``.
        replace: Whether it may exist.

    Returns:
        The number of events.

    Raises:
        TraceError: The file exists.
    """
    if out.exists() and not replace:
        raise TraceError(f"--out must not exist; got {str(out)!r}. Pass --force to replace it.")
    part = out.with_name(f"{out.name}.part")
    try:
        with _open(part, compressed=out.suffix == ".gz") as file:
            num_events = _write(run, file)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return num_events


def _open(path: Path, *, compressed: bool) -> IO[str]:
    if compressed:
        return gzip.open(path, "wt", encoding="utf-8", compresslevel=4)
    return path.open("w", encoding="utf-8")


def _write(run: Run, file: IO[str]) -> int:
    separator, num_events = "[\n", 0
    for each, align in zip(run.files, run.alignments, strict=True):
        for event in each.events():
            if "ts" in event:
                at_ns = align(time_ns(event)) - run.start_ns
                event = {**event, "ts": at_ns / 1000}
            file.write(separator + json.dumps(event, separators=(",", ":")))
            separator, num_events = ",\n", num_events + 1
    file.write("\n]\n")
    return num_events


COMMAND = Command(
    name="merge",
    summary="merge the files of all ranks into one for a viewer",
    details=(
        "Open it with https://ui.perfetto.dev or chrome://tracing: a process per rank, a row per\n"
        "thread. The clocks of all ranks are aligned."
    ),
    example="shardopt trace merge traces -o run.json.gz",
    exit_codes=("merged", "never"),
    add_arguments=add_arguments,
    run=run,
)
