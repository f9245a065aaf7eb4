"""The plot of step times."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks.cases.step import LIMIT
from benchmarks.contenders.names import SHARDOPT
from benchmarks.harness.result import Result
from benchmarks.report.tables import CONTENDERS, LABELS, nanoseconds

INK, PALE_INK, OURS, THEIRS, MARK = "#24292f", "#6e7781", "#0b7a75", "#c3cad1", "#c2410c"


def draw_step_time(results: Sequence[Result], paths: Sequence[Path]) -> None:
    """Draw a panel of bars for each number of ranks.

    Args:
        results: The results of the case ``step``.
        paths: The files to write, SVG or PNG.
    """
    mpl.rcParams.update(
        {"font.size": 10, "text.color": INK, "svg.hashsalt": "shardopt", "svg.fonttype": "none"}
    )
    figure, axes = plt.subplots(
        1, len(results), figsize=(4.9 * len(results) + 0.6, 3.5), squeeze=False, sharey=True
    )
    for axis, result in zip(axes[0], results, strict=True):
        _draw_panel(axis, result)
    model = f"{results[0].numel / 2**20:.0f} Mi {results[0].dtype} parameters"
    title = f"One optimizer step, {model}, gradients averaged over the ranks"
    figure.suptitle(title, x=0.012, y=0.975, ha="left", weight="bold", size=11.5)
    figure.text(0.012, 0.022, footnote(results), size=7.5, color=PALE_INK, linespacing=1.5)
    figure.tight_layout(rect=(0, 0.1, 1, 0.97), w_pad=2.5)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, facecolor="white", dpi=150, metadata=metadata)
    plt.close(figure)


def _draw_panel(axis: Any, result: Result) -> None:
    names = [name for name in CONTENDERS if result.has(name)]
    values = [nanoseconds(result, name) for name in names]
    colors = [OURS if name == SHARDOPT else THEIRS for name in names]
    axis.barh(range(len(names)), values, color=colors, height=0.62)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        times = "" if name == SHARDOPT else f"   {value / values[0]:.1f} ×"
        weight = "bold" if name == SHARDOPT else "normal"
        axis.text(value + 0.015 * max(values), place, f"{value:.2f} ns{times}", va="center",
                  weight=weight)  # fmt: skip
    limit = result.value(LIMIT)
    axis.axvline(limit, color=MARK, lw=1.2, ls=(0, (4, 2)), zorder=3)
    axis.annotate(
        f"limit of memory: {limit:.2f} ns", (limit, -0.62), (5, 0), textcoords="offset points",
        color=MARK, size=8.5, va="center",
    )  # fmt: skip
    axis.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axis.set_ylim(len(names) - 0.45, -0.9)
    axis.set_xlim(0, 1.32 * max(values))
    axis.set_title(f"{result.ranks} ranks", loc="left", size=10.5)
    axis.set_xlabel("ns per parameter (less is better)", color=PALE_INK)
    axis.tick_params(length=0, colors=INK)
    axis.tick_params(axis="x", colors=PALE_INK)
    axis.grid(axis="x", color="#eaeef2")
    axis.set_axisbelow(True)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)


def footnote(results: Sequence[Result]) -> str:
    """Return where the times come from, in two lines."""
    origin = results[0].origin
    machine, versions = origin.machine, origin.versions
    peers = f"torch {versions['torch']} over Gloo, " if "torch" in versions else ""
    rounds = min(len(samples) for result in results for samples in result.samples_s.values())
    commits = ", ".join(dict.fromkeys(result.origin.commit for result in results))
    return (
        f"{machine['cpu']}, {machine['cores']} cores. {origin.mpi}, {peers}"
        f"NumPy {versions['numpy']}, Numba {versions['numba']}. Commit {commits}, "
        f"{origin.date[:10]}.\nTime of the slowest rank, median of {rounds} interleaved rounds. "
        "Limit: the bytes a step must move, at the bandwidth all ranks reached in the same run."
    )
