"""Options that several commands have."""

import argparse
from pathlib import Path

from benchmarks import RESULTS_FOLDER


def report_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of the options of a command that reports results."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS_FOLDER,
        help="folder with the results (benchmarks/results)",
    )
    return parser
