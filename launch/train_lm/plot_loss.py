"""The training curves: ``loss.png``, drawn from a run's ``train.jsonl``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("agg")  # draws into files: ranks have no screen

import matplotlib.pyplot as plt
import numpy as np

from train_lm import run_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from train_lm.run_log import Record

FILE_NAME = "loss.png"
INK, FAINT = "#1f2933", "#9aa5b1"
TRAIN_COLOR, HELD_OUT_COLOR = "#2a78c2", "#d9480f"
BASELINE_COLOR = "#7b8794"
SMOOTHING_PARTS = 50
"""The training curve is a running mean over one part in so many of its length."""


def plot_loss(folder: Path) -> Path:
    """Draw the curves of a run, finished or not.

    The new picture replaces the old one in one rename: a kill leaves either one whole.

    Args:
        folder: The one with the log.

    Returns:
        The picture's path.

    Raises:
        FileNotFoundError: The folder holds no log.
    """
    records = run_log.read_log(folder)
    start = [record for record in records if record["kind"] == "start"][-1]
    steps = [record for record in records if record["kind"] == "step"]
    evals = [record for record in records if record["kind"] == "eval"]

    with plt.rc_context({"font.size": 11, "text.color": INK, "axes.labelcolor": INK}):
        figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
        draw_baselines(axes, start)
        draw_train(axes, steps)
        draw_held_out(axes, evals)
        decorate(axes, start, evals)
        path = folder / FILE_NAME
        partial = path.with_name(f".{FILE_NAME}.partial")
        figure.savefig(partial, dpi=150, format="png")
        plt.close(figure)
    os.replace(partial, path)
    return path


def draw_baselines(axes: Axes, start: Record) -> None:
    """Draw a labelled line for each of the losses that counting reaches."""
    for name in ("unigram", "bigram"):
        bits = start[f"{name}_bits"]
        axes.axhline(bits, color=BASELINE_COLOR, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate(
            f"{name} counts  {bits:.2f}",
            xy=(1, bits),
            xycoords=("axes fraction", "data"),
            xytext=(-6, 4),
            textcoords="offset points",
            horizontalalignment="right",
            color=BASELINE_COLOR,
        )


def draw_train(axes: Axes, steps: list[Record]) -> None:
    """Draw the loss of each step faintly, and its running mean boldly."""
    if not steps:
        return
    at = np.array([record["step"] for record in steps])
    bits = np.array([record["train_bits"] for record in steps])
    window = max(1, len(bits) // SMOOTHING_PARTS)
    smooth = np.convolve(bits, np.ones(window) / window, mode="valid")
    axes.plot(at, bits, color=TRAIN_COLOR, linewidth=0.6, alpha=0.25)
    middle = at[window // 2 :][: len(smooth)]
    axes.plot(middle, smooth, color=TRAIN_COLOR, linewidth=1.8, label="training")


def draw_held_out(axes: Axes, evals: list[Record]) -> None:
    """Draw the held-out loss, with a mark for each evaluation."""
    at = [record["step"] for record in evals]
    bits = [record["held_out_bits"] for record in evals]
    axes.plot(at, bits, "o-", color=HELD_OUT_COLOR, linewidth=1.8, markersize=5, label="held out")


def decorate(axes: Axes, start: Record, evals: list[Record]) -> None:
    """Add title, labels and grid; the initial fall from 8 bits stays out of view."""
    highest_bits = start["unigram_bits"]
    if evals:
        last = evals[-1]
        highest_bits = max(highest_bits, last["held_out_bits"])
        title = f"{last['held_out_bits']:.2f} bits per byte after {last['step']:,} steps"
    else:
        title = "Before the first evaluation"
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", pad=26)
    axes.text(0, 1.03, start["caption"], transform=axes.transAxes, color=BASELINE_COLOR)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("bits per byte")
    axes.set_xlim(0, None)
    axes.set_ylim(None, highest_bits + 0.8)
    axes.grid(axis="y", color=FAINT, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1.06), borderpad=0)


def main() -> int:
    """Draw the run in the folder that the command line names; returns the exit code."""
    if len(sys.argv) != 2 or not Path(sys.argv[1], run_log.FILE_NAME).is_file():
        usage = f"usage: python {sys.argv[0]} FOLDER\n\nFOLDER must hold a {run_log.FILE_NAME}."
        print(usage, file=sys.stderr)
        return 2
    print(plot_loss(Path(sys.argv[1])))
    return 0
