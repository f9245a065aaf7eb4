"""``python -m benchmarks compare OLD NEW``: what got slower, beyond the noise."""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import RESULTS_FOLDER, ROOT
from benchmarks.cases import CASES
from benchmarks.harness.record import parse
from benchmarks.harness.result import Result
from benchmarks.report.comparison import (
    CONFIDENCE,
    MIN_ROUNDS,
    TOLERANCE,
    Difference,
    Runs,
    Setting,
    compare,
    newest_runs,
)

_WIDTH = 58
NOTHING_TO_JUDGE = 2
"""Exit code of a comparison that could not find anything out."""


def main(words: Sequence[str]) -> None:
    """Compare two sets of results; exit with 1 if something got worse."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description="Compare two sets of results, by ratios within each run.",
        epilog=f"OLD and NEW are folders of results, files, or revisions of git, whose "
        f"{RESULTS_FOLDER.relative_to(ROOT)} is read. Of each setting the runs of the newest "
        "commit count.",
    )
    parser.add_argument("old", metavar="OLD", type=results_of)
    parser.add_argument("new", metavar="NEW", type=results_of)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"relative change that may have other reasons than the code ({TOLERANCE:g})",
    )
    parser.add_argument(
        "--times", action="store_true", help="also show times, if the machine is the same"
    )
    arguments = parser.parse_args(words)
    sys.exit(
        report(newest_runs(arguments.old), newest_runs(arguments.new), arguments.tolerance,
               with_times=arguments.times)
    )  # fmt: skip


def results_of(source: str) -> list[Result]:
    """Read all results in a folder, in a file or in a revision of git.

    Raises:
        argparse.ArgumentTypeError: There is no such thing.
    """
    path = Path(source)
    if path.is_dir():
        texts = [file.read_text() for file in sorted(path.glob("*.jsonl"))]
    elif path.is_file():
        texts = [path.read_text()]
    else:
        texts = list(_texts_of_revision(source))
    return [result for text in texts for result in parse(text) if result.case in CASES]


def _texts_of_revision(revision: str) -> Iterator[str]:
    folder = RESULTS_FOLDER.relative_to(ROOT).as_posix()
    try:
        listed = _git("ls-tree", "--name-only", f"{revision}^{{commit}}", "--", f"{folder}/")
    except (OSError, subprocess.CalledProcessError):
        raise argparse.ArgumentTypeError(
            f"results must be in a folder, a file or a revision of git; got {revision!r}. "
            "Check its name."
        ) from None
    for name in listed.splitlines():
        if name.endswith(".jsonl"):  # as in a folder; those below are none of results
            yield _git("show", f"{revision}:{name}")


def _git(*words: str) -> str:
    command = ["git", *words]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def report(
    old: dict[Setting, Runs], new: dict[Setting, Runs], tolerance: float, *, with_times: bool
) -> int:
    """Print the comparison of all settings that both sides have, and return the exit code."""
    print(
        f"Ratios within each run are compared. In brackets: {CONFIDENCE:.0%} interval of new / "
        f"old, by a\nbootstrap over rounds (at least {MIN_ROUNDS}) and runs. Worse or better: the "
        f"whole interval is beyond {tolerance:.0%}."
    )
    found: dict[str, Difference] = {}
    for setting in sorted(old.keys() & new.keys()):
        runs = old[setting], new[setting]
        heading = " ".join(filter(None, (f"{setting[0]}:", ", ".join(filter(None, setting[1:])))))
        if set(map(_identity, runs[0])) == set(map(_identity, runs[1])):
            print(f"\n{heading}: the same runs")
            continue
        print(f"\n{heading}\n  {_about(runs[0])} -> {_about(runs[1])}")
        differences = compare(CASES[setting[0]], *runs, tolerance)
        print("\n".join(map(_line, differences)))
        if with_times:
            print("\n".join(_times(*runs)))
        found |= {f"{heading}: {each.name}": each for each in differences}
    for side, only in (("OLD", old.keys() - new.keys()), ("NEW", new.keys() - old.keys())):
        for setting in sorted(only):
            print(f"\n{', '.join(filter(None, setting))}: only in {side}")
    return _conclude(found)


def _conclude(found: Mapping[str, Difference]) -> int:
    judged = [each for each in found.values() if each.is_judged]
    worse = [name for name, each in found.items() if each.is_regression]
    if len(judged) < len(found):
        print(
            f"\n{len(found) - len(judged)} ratios could not be judged: other jobs ran, or rounds "
            "are too few. Repeat the runs."
        )
    if not judged:
        print("\nThere is nothing to compare: no setting was measured anew that can be judged.")
        return NOTHING_TO_JUDGE
    if not worse:
        print(f"\nNone of {len(judged)} ratios got worse beyond the noise.")
        return 0
    print(f"\n{len(worse)} of {len(judged)} ratios got worse:")
    print("\n".join(f"  {name}" for name in worse))
    return 1


def _identity(run: Result) -> tuple[str, str]:
    return run.origin.date, run.origin.commit


def _about(runs: Runs) -> str:
    number = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    noise = "" if all(run.is_quiet for run in runs) else ", other jobs ran"
    return f"{number} of commit {runs[-1].origin.commit}{noise}"


def _line(each: Difference) -> str:
    name, values = f"  {each.name:<{_WIDTH}}", f"{each.old:9.3f} -> {each.new:9.3f}"
    interval = "" if each.low != each.low else f"[{each.low:.3f}, {each.high:.3f}]"
    return f"{name} {values}  {interval:<16}  {each.change}"


def _times(old: Runs, new: Runs) -> Iterator[str]:
    """Write the times of all contenders, which say little even on the same machine."""
    machines = {str(sorted(run.origin.machine.items())) for run in (*old, *new)}
    if len(machines) > 1:
        yield "  times: not comparable, as these are different machines"
        return
    for key in old[-1].samples_s:
        if new[-1].has(key):
            before, after = 1e3 * old[-1].value(key), 1e3 * new[-1].value(key)
            yield f"  for information: ms of {key:<{_WIDTH - 23}} {before:9.3f} -> {after:9.3f}"
