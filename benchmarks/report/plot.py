"""The plots of step times and of training, readable on light and on dark pages."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks.cases.step import LIMIT
from benchmarks.cases.training import STEPS, held_out_bits, tokens_per_s
from benchmarks.contenders.names import DDP, FSDP2, SHARDOPT, THROUGH_TORCH
from benchmarks.harness.result import Result
from benchmarks.report.tables import CONTENDERS, LABELS, nanoseconds

INK, PALE_INK, OURS, THEIRS, MARK = "#24292f", "#6e7781", "#0b7a75", "#c3cad1", "#c2410c"
THIRD, GRID, PAGE = "#6639ba", "#eaeef2", "#ffffff"
DARK = {
    INK: "#e6edf3",
    PALE_INK: "#9198a1",
    OURS: "#39c5bb",
    THEIRS: "#484f58",
    MARK: "#ff9b6a",
    THIRD: "#c297ff",
    GRID: "#30363d",
    PAGE: "#0d1117",
}
"""The color that stands for each of them on a dark page."""


_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "svg.hashsalt": "shardopt",
    "svg.fonttype": "none",
}


def draw_step_time(results: Sequence[Result], paths: Sequence[Path]) -> None:
    """Draw a panel of bars for each number of ranks.

    Args:
        results: The results of the case ``step``.
        paths: The files to write, SVG or PNG.
    """
    mpl.rcParams.update(_STYLE)
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
    _save(figure, paths)


def draw_training(result: Result, paths: Sequence[Path]) -> None:
    """Draw the held-out loss of each contender over the seconds that it has trained.

    Args:
        result: Of the case ``training``.
        paths: The files to write, SVG or PNG.
    """
    mpl.rcParams.update(_STYLE)
    figure, axis = plt.subplots(figsize=(8.2, 4.2))
    for name, color in ((THROUGH_TORCH, OURS), (DDP, MARK), (FSDP2, THIRD)):
        if result.has(name):
            seconds, bits = learning_curve(result, name)
            is_ours = name == THROUGH_TORCH
            axis.plot(seconds, bits, "o-", color=color, lw=2.4 if is_ours else 1.6, ms=4)
            rate = f"{name}\n{result.value(tokens_per_s(name)):.0f} tokens/s"
            axis.annotate(
                rate, (seconds[-1], bits[-1]), (4, -9), textcoords="offset points", color=color,
                va="top", ha="right", weight="bold" if is_ours else "normal", size=9,
            )  # fmt: skip
    axis.set_xlim(0, None)
    lowest, highest = axis.get_ylim()
    axis.set_ylim(lowest - 0.15 * (highest - lowest), None)  # for the words below the ends
    axis.set_xlabel("seconds of training, evaluation left out", color=PALE_INK)
    axis.set_ylabel("held-out bits per byte", color=PALE_INK)
    _tidy(axis, "both")
    title = f"A GPT of {result.numel / 1e6:.0f} M parameters on {result.ranks} ranks"
    figure.suptitle(title, x=0.012, y=0.975, ha="left", weight="bold", size=11.5)
    tokens = result.ranks * result.settings["batch"] * result.settings["context"]
    note = (
        f"{_where([result])}\nThe same {tokens} tokens in each step, in turn, "
        f"{result.settings[STEPS]} steps a round. The first round warms up and is not timed."
    )
    figure.text(0.012, 0.022, note, size=7.5, color=PALE_INK, linespacing=1.5)
    figure.tight_layout(rect=(0, 0.1, 0.99, 1))
    _save(figure, paths)


def learning_curve(result: Result, name: str) -> tuple[list[float], list[float]]:
    """Return the seconds that a contender has trained and its held-out loss, after each round."""
    rounds_s = [step_s * result.settings[STEPS] for step_s in result.samples_s[name]]
    return list(accumulate(rounds_s, initial=0.0)), list(result.curves[held_out_bits(name)])


def _save(figure: Any, paths: Sequence[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, facecolor=PAGE, dpi=150, metadata=metadata)
        if path.suffix == ".svg":
            path.write_text(with_dark_colors(path.read_text()))
    plt.close(figure)


def with_dark_colors(svg: str) -> str:
    """Add the colors that a plot has where pages are dark to its SVG."""
    rules = [
        f'[style*="{part}: {light}"]{{{part}:{dark} !important}}'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    ]
    style = f"<style>@media (prefers-color-scheme: dark) {{\n{chr(10).join(rules)}\n}}</style>"
    return svg.replace("</svg>", f"{style}\n</svg>")


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
    _tidy(axis, "x")


def _tidy(axis: Any, numbers: str) -> None:
    """Leave of an axis its grid and its words; those of numbers are pale."""
    axis.tick_params(length=0, colors=INK)
    axis.tick_params(axis=numbers, colors=PALE_INK)
    axis.grid(axis=numbers, color=GRID)
    axis.set_axisbelow(True)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)


def footnote(results: Sequence[Result]) -> str:
    """Return where the times come from, in two lines."""
    rounds = min(len(samples) for result in results for samples in result.samples_s.values())
    return (
        f"{_where(results)}\nTime of the slowest rank, median of {rounds} interleaved rounds. "
        "Limit: the bytes a step must move, at the bandwidth all ranks reached in the same run."
    )


def _where(results: Sequence[Result]) -> str:
    origin = results[0].origin
    machine, versions = origin.machine, origin.versions
    peers = f"torch {versions['torch']} over Gloo, " if "torch" in versions else ""
    commits = ", ".join(dict.fromkeys(result.origin.commit for result in results))
    return (
        f"{machine['cpu']}, {machine['cores']} cores. {origin.mpi}, {peers}"
        f"NumPy {versions['numpy']}, Numba {versions['numba']}. Commit {commits}, "
        f"{origin.date[:10]}."
    )
