"""The command line of the benchmarks; see README.md."""

import argparse
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from benchmarks import RESULTS_FOLDER
from benchmarks.cases import CASES
from benchmarks.harness.options import add_options, read_options
from benchmarks.harness.record import append
from benchmarks.report import tables, verdict

_DESCRIPTION = """\
Measure shardopt against its peers and the limits of the machine. Without arguments, list the cases
with their targets. With the names of cases, measure them and append a line to the results of each.
"""


def main(words: Sequence[str]) -> None:
    """Run one of the commands, or the cases named."""
    commands = {"plot": plot, "tables": write_tables, "summary": summarize}
    if not words:
        print(list_cases())
    elif words[0] in commands:
        commands[words[0]](words[1:])
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
        usage="%(prog)s [CASE ... [options] | plot | tables | summary]",
        description=_DESCRIPTION,
        epilog="Each of plot, tables and summary takes --help too.",
    )
    parser.add_argument("case", nargs="*", type=known_case, metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--out", type=Path, default=RESULTS_FOLDER, help="folder for results (benchmarks/results)"
    )
    add_options(parser, {name: CASES[name].options for name in shown})
    arguments = parser.parse_args(words)
    for case in map(CASES.__getitem__, arguments.case):
        for result in case.measure(read_options(case.options, arguments)):
            append(case, result, arguments.out)
            print(verdict.table(case, result), flush=True)


def known_case(word: str) -> str:
    """Return the name of a case, or raise what argparse turns into an explanation."""
    if word not in CASES:
        names = ", ".join(CASES)
        raise argparse.ArgumentTypeError(f"a case must be one of {names}; got {word}.")
    return word


def plot(words: Sequence[str]) -> None:
    """Draw the plot of step times."""
    parser = _report_parser("plot", "Draw the times of a step, from the newest results.")
    parser.add_argument("--mpi", default="MPICH", help="library whose times are shown (MPICH)")
    parser.add_argument("--png", action="store_true", help="draw a PNG beside the SVG")
    parser.add_argument(
        "--to", type=Path, default=tables.STEP_PLOT, help="SVG file to write (benchmarks/plots/...)"
    )
    arguments = parser.parse_args(words)
    steps = tables.read_figures(arguments.results).steps
    shown = [result for result in steps if result.origin.mpi.startswith(arguments.mpi)]
    if not shown:
        sys.exit(f"There are no results of step with {arguments.mpi} in {arguments.results}.")
    from benchmarks.report.plot import draw_step_time  # here: only this needs matplotlib

    paths = [arguments.to, *([arguments.to.with_suffix(".png")] if arguments.png else [])]
    draw_step_time(shown, paths)
    print("\n".join(map(str, paths)))


def write_tables(words: Sequence[str]) -> None:
    """Write the tables of results, or that of targets, as Markdown."""
    parser = _report_parser("tables", "Write the newest results as Markdown tables.")
    parser.add_argument("--targets", action="store_true", help="write the table of targets instead")
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="rewrite the part of FILE between its markers"
    )
    arguments = parser.parse_args(words)
    part = tables.TARGETS if arguments.targets else tables.FIGURES
    if arguments.targets:
        text = tables.targets_table(CASES)
    else:
        place = {} if arguments.into is None else {"folder": arguments.into.parent}
        text = tables.figures_text(tables.read_figures(arguments.results), **place)
    if arguments.into is None:
        print(text)
    else:
        tables.rewrite(arguments.into, part, text)


def summarize(words: Sequence[str]) -> None:
    """Print the targets beside the newest results."""
    arguments = _report_parser(
        "summary", "Compare the newest results of all cases with their targets."
    ).parse_args(words)
    print(verdict.summary(CASES, arguments.results))


def _report_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS_FOLDER,
        help="folder with the results (benchmarks/results)",
    )
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
