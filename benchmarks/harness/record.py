"""Files of results: one JSON line for each run of a case."""

import json
from pathlib import Path

from benchmarks.harness.case import Case
from benchmarks.harness.result import Result


def append(case: Case, result: Result, folder: Path) -> None:
    """Append a result, with its ratios and targets, to the case's file in a folder."""
    line = result.to_json()
    line["ratios"] = [verdict.to_json() for verdict in case.judge(result)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{case.name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(case: Case, folder: Path) -> list[Result]:
    """Read all results of a case from a folder, in the order they were recorded in."""
    path = folder / f"{case.name}.jsonl"
    return parse(path.read_text()) if path.exists() else []


def parse(text: str) -> list[Result]:
    """Read all results in the text of a file."""
    return [Result.from_json(json.loads(line)) for line in text.splitlines()]


def newest(results: list[Result]) -> list[Result]:
    """Pick the newest result for each number of ranks and each MPI library, quiet ones first."""
    ordered = sorted(results, key=lambda result: (result.is_quiet, result.origin.date))
    last = {(result.ranks, result.origin.mpi.split()[0]): result for result in ordered}
    return [last[kind] for kind in sorted(last)]
