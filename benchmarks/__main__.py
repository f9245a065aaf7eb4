"""The command line of the benchmarks; see README.md."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

from benchmarks import RESULTS_FOLDER
from benchmarks.cases import CASES
from benchmarks.commands import compare, plot, quick, write_tables
from benchmarks.commands.options import report_parser
from benchmarks.harness.options import add_options, read_options
from benchmarks.harness.record import append
from benchmarks.report import verdict

_DESCRIPTION = """\
Measure shardopt against its peers and the limits of the machine. Without arguments, list the cases
with their targets. With the names of cases, measure them and append a line to the results of each.
"""


def main(words: Sequence[str]) -> None:
    """Run one of the commands, or the cases named."""
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "plot": plot.main,
        "tables": write_tables.main,
        "summary": summarize,
        "compare": compare.main,
        "quick": quick.main,
    }
    if not words:
        print(list_cases())
    elif words[0].removeprefix("--") in commands:
        commands[words[0].removeprefix("--")](words[1:])
    else:
        run_cases(words)


def list_cases() -> str:
    """Return the cases, how each is started, and their targets."""
    parts = []
    for case in CASES.values():
        lines = [f"{case.name}: {case.measures}", f"    {case.start}"]
        lines += [
            f"    {ratio.name.replace('{ranks}', 'ranks')}: {ratio.target}"
            for ratio in case.ratios
            if ratio.target is not None
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def run_cases(words: Sequence[str]) -> None:
    """Measure the cases named; the options that follow hold for those of them that have them."""
    named = list(takewhile(lambda word: not word.startswith("-"), words))
    shown = [name for name in named if name in CASES] or list(CASES)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="%(prog)s [CASE ... [options] | --quick | plot | tables | summary | compare]",
        description=_DESCRIPTION,
        epilog="Each of --quick, plot, tables, summary and compare takes --help too.",
    )
    parser.add_argument("case", nargs="*", type=known_case, metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--out", type=Path, default=RESULTS_FOLDER, help="folder for results (benchmarks/results)"
    )
    add_options(parser, {name: CASES[name].options for name in shown})
    arguments = parser.parse_args(words)
    for case in map(CASES.__getitem__, arguments.case):
        results = []
        for result in case.measure(read_options(case.options, arguments)):
            append(case, result, arguments.out)
            results.append(result)
            if case.page is None:
                print(verdict.table(case, result), flush=True)
        if case.page is not None and results:
            pages = importlib.import_module(case.page)
            print(pages.page(results), flush=True)


def known_case(word: str) -> str:
    """Return the name of a case, or raise what argparse turns into an explanation."""
    if word not in CASES:
        names = ", ".join(CASES)
        raise argparse.ArgumentTypeError(f"a case must be one of {names}; got {word}.")
    return word


def summarize(words: Sequence[str]) -> None:
    """Print the targets beside the newest results."""
    arguments = report_parser(
        "summary", "Compare the newest results of all cases with their targets."
    ).parse_args(words)
    print(verdict.summary(CASES, arguments.results))


if __name__ == "__main__":
    main(sys.argv[1:])
