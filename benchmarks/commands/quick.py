"""Every case in its small version: whether all of them work, in less than three minutes."""

import argparse
import importlib.util
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from benchmarks import ROOT
from benchmarks.cases import CASES
from benchmarks.harness.case import Case, Quick
from benchmarks.harness.jobs import run_ranks
from benchmarks.harness.record import read
from benchmarks.report import verdict

_LIMIT_S = 300
_LAST_LINES = 20
_HEAD = """\
QUICK SIZES ARE NO CLAIMS. They show that each case works; the targets printed beside the values
are for the sizes that a case has by itself."""


def main(words: Sequence[str]) -> None:
    """Run the small version of all cases, or of those named; exit with 1 if one fails."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks --quick",
        description="Run each case in a small version, to see whether it works.",
    )
    parser.add_argument("case", nargs="*", choices=[*CASES, []], metavar="CASE")
    parser.add_argument(
        "--out", type=Path, default=new_folder(), help="folder for results (runs/quick_DATE)"
    )
    arguments = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # jobs end with it
    sys.exit(run_all([CASES[name] for name in arguments.case or CASES], arguments.out))


def new_folder() -> Path:
    """Return the name of a folder where no other results are."""
    return ROOT / "runs" / f"quick_{datetime.now():%Y-%m-%d_%H-%M-%S}"


def run_all(cases: Sequence[Case], out: Path) -> int:
    """Run cases one after the other, print what they find, and return the exit code."""
    print(_HEAD, flush=True)
    begin_s, num_run, failed = time.monotonic(), 0, []
    for case in cases:
        left_out = why_not(case.quick)
        if left_out:
            print(f"\n{case.name}: left out, as {left_out}", flush=True)
            continue
        num_run += 1
        assert isinstance(case.quick, Quick)
        if not run_case(case, case.quick, out):
            failed.append(case.name)
    print(f"\n{num_run} cases in {time.monotonic() - begin_s:.0f} s, results in {out}")
    print(f"FAILED: {', '.join(failed)}" if failed else "All of them work. Quick sizes: no claims.")
    return 1 if failed else 0


def why_not(quick: Quick | str) -> str:
    """Return the reason why a case cannot be run here; "" if it can."""
    if isinstance(quick, str):
        return quick
    missing = [name for name in quick.modules if importlib.util.find_spec(name) is None]
    return f"there is no {' and no '.join(missing)}" if missing else ""


def run_case(case: Case, quick: Quick, out: Path) -> bool:
    """Run a case and print its ratios; return whether it has worked."""
    num_before, begin_s = len(read(case, out)), time.monotonic()
    words = ["-m", "benchmarks", case.name, *quick.words, "--out", str(out)]
    code, printed = run_ranks(words, quick.ranks, _LIMIT_S)
    results = read(case, out)[num_before:]
    ranks = "1 rank" if quick.ranks == 1 else f"{quick.ranks} ranks"
    print(f"\n{case.name}: {ranks}, {time.monotonic() - begin_s:.0f} s", flush=True)
    if code == 0 and results:
        print("\n".join(verdict.beside_targets(case, result) for result in results), flush=True)
        return True
    reason = f"it did not end within {_LIMIT_S} s" if code is None else f"exit code {code}"
    print(f"  FAILED: {reason if code != 0 else 'it has recorded nothing'}. Its last lines:")
    print("\n".join(f"  | {line}" for line in printed.splitlines()[-_LAST_LINES:]), flush=True)
    return False
