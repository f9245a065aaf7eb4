"""``python -m benchmarks tables``: the newest results, or all targets, as Markdown."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import CASES
from benchmarks.commands.options import report_parser
from benchmarks.harness.record import read
from benchmarks.report import memory, predictions, scaling, tables
from benchmarks.report.stages import STAGES, stages_text


def main(words: Sequence[str]) -> None:
    """Print one kind of tables, or rewrite it in a file."""
    parser = report_parser("tables", "Write the newest results as Markdown tables.")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--targets", action="store_true", help="write the table of targets instead")
    kinds.add_argument("--stages", action="store_true", help="write stage 2 beside stage 1 instead")
    kinds.add_argument(
        "--predictions", action="store_true", help="write measured steps beside simulated ones"
    )
    kinds.add_argument("--scaling", action="store_true", help="write those of scaling instead")
    kinds.add_argument(
        "--memory", action="store_true", help="write bytes per node and parameter, as planned"
    )
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="rewrite the part of FILE between its markers"
    )
    arguments = parser.parse_args(words)
    into: Path | None = arguments.into
    if arguments.targets:
        part, text = tables.TARGETS, tables.targets_table(CASES)
    elif arguments.stages:
        part, text = STAGES, stages_text(arguments.results)
    elif arguments.predictions:
        part, text = predictions.PREDICTIONS, predictions.predictions_text(arguments.results)
    elif arguments.scaling:
        part, text = scaling.PART, scaling.markdown(read(CASES["scaling"], arguments.results))
    elif arguments.memory:
        part, text = memory.PART, memory.bytes_text()
    else:
        place = {} if into is None else {"folder": into.parent}
        part = tables.FIGURES
        text = tables.figures_text(tables.read_figures(arguments.results), **place)
    if into is None:
        print(text)
    else:
        tables.rewrite(into, part, text)
