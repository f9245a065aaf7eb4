"""Benchmarks: ``python -m benchmarks`` lists them with their targets; README.md explains them."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RESULTS_FOLDER = FOLDER / "results"
PLOTS_FOLDER = FOLDER / "plots"
