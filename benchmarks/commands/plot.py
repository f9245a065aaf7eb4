"""``python -m benchmarks plot``: the newest results, and planned memory, as pictures."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import PLOTS_FOLDER
from benchmarks.cases import CASES
from benchmarks.cases.scaling import STRONG, WEAK
from benchmarks.commands.options import report_parser
from benchmarks.harness.record import read
from benchmarks.report import tables


def main(words: Sequence[str]) -> None:
    """Draw the plots of a case."""
    parser = report_parser("plot", "Draw the newest results of a case.")
    parser.add_argument(
        "case", nargs="?", choices=tuple(_DRAW), default="step", help="what to draw (step)"
    )
    parser.add_argument("--mpi", default="MPICH", help="library whose times are shown (MPICH)")
    parser.add_argument(
        "--png", action="store_true", help="draw a PNG beside the SVG, for step and training"
    )
    parser.add_argument(
        "--to",
        type=Path,
        help="SVG file to write, or folder for those of scaling (benchmarks/plots)",
    )
    arguments = parser.parse_args(words)
    paths = _DRAW[arguments.case](arguments)
    if not paths:
        sys.exit(
            f"There are no results of {arguments.case} with {arguments.mpi} in "
            f"{arguments.results} that can be drawn."
        )
    print("\n".join(map(str, paths)))


def _draw_steps(arguments: argparse.Namespace) -> list[Path]:
    steps = tables.read_figures(arguments.results).steps
    shown = [result for result in steps if result.origin.mpi.startswith(arguments.mpi)]
    if not shown:
        return []
    from benchmarks.report.plot import draw_step_time  # here: only this needs matplotlib

    paths = _paths(arguments)
    draw_step_time(shown, paths)
    return paths


def _draw_training(arguments: argparse.Namespace) -> list[Path]:
    found = tables.read_figures(arguments.results).training
    shown = [result for result in found if result.origin.mpi.startswith(arguments.mpi)]
    if not shown:
        return []
    from benchmarks.report.plot import draw_training  # here: only this needs matplotlib

    paths = _paths(arguments)
    draw_training(shown[0], paths)
    return paths


def _paths(arguments: argparse.Namespace) -> list[Path]:
    path = arguments.to or tables.PLOTS[arguments.case]
    return [path, *([path.with_suffix(".png")] if arguments.png else [])]


def _draw_scaling(arguments: argparse.Namespace) -> list[Path]:
    """Draw what has two numbers of ranks with a core for each thread."""
    from benchmarks.report.scaling_plot import draw_scaling  # here: only this needs shardopt

    results = [
        result
        for result in read(CASES["scaling"], arguments.results)
        if result.origin.mpi.startswith(arguments.mpi)
    ]
    folder, paths = arguments.to or PLOTS_FOLDER, []
    for mode in (STRONG, WEAK):
        text = draw_scaling(results, mode)
        if text is not None:
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / f"scaling_{mode}.svg")
            paths[-1].write_text(text)
    return paths


def _draw_choosing(arguments: argparse.Namespace) -> list[Path]:
    """Draw the memory of each setting, which is computed and needs no results."""
    from benchmarks.report.choosing_plot import draw_choosing  # here: only this needs shardopt

    path: Path = arguments.to or PLOTS_FOLDER / "choosing.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(draw_choosing(), encoding="utf-8")
    return [path]


_DRAW: dict[str, Callable[[argparse.Namespace], list[Path]]] = {
    "step": _draw_steps,
    "training": _draw_training,
    "scaling": _draw_scaling,
    "choosing": _draw_choosing,
}
