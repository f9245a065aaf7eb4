"""Draw the README's figures and write its tables from the newest lines under ``results/``.

python benchmarks/plot.py [--readme README.md]
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from names import (
    BARE_READ,
    BESIDE,
    BYTES_PER_PARAMETER,
    CHECKPOINT_NBYTES,
    CPU,
    DCP,
    DCP_KEPT,
    DIRECT_WRITE,
    DURABLE,
    FOLDER,
    HIDDEN,
    LIMIT,
    LOAD,
    MEMCPY,
    MEMORY_NUMEL,
    NARROW,
    NARROW_WIRE,
    NODES_NUMEL,
    QUIET,
    REDUCE_SCATTER,
    REPLICATED,
    RESULTS_FOLDER,
    SHARDOPT,
    STALL,
    STEP,
    STEP_NUMEL,
    THROUGH_JAX,
    THROUGH_LUCID,
    THROUGH_TORCH,
    THROUGH_TORCH_BFLOAT16,
    TORCH_SAVE,
    UPDATE_ALONE,
    WIRE,
    ZERO_REDUNDANCY,
)

PLOTS_FOLDER = FOLDER / "plots"
BEGIN, END = "<!-- figures begin -->", "<!-- figures end -->"

CONTENDERS = (SHARDOPT, REDUCE_SCATTER, ZERO_REDUNDANCY, REPLICATED)
LABELS = {
    SHARDOPT: "shardopt",
    REDUCE_SCATTER: "MPI reduce-scatter,\nour kernel, allgather",
    ZERO_REDUNDANCY: "torch all_reduce +\nZeroRedundancyOptimizer",
    REPLICATED: "torch all_reduce +\nNAdam on every rank",
}
FRAMEWORKS = {
    SHARDOPT: "NumPy",
    THROUGH_TORCH: "PyTorch",
    THROUGH_TORCH_BFLOAT16: "PyTorch, bfloat16",
    THROUGH_JAX: "JAX: gradients copied in, new arrays out",
    THROUGH_LUCID: "lucid: gradients copied in",
}
SAVERS = {
    SHARDOPT: "shardopt",
    DCP: "torch DCP `async_save`",
    DCP_KEPT: "the same, its stager kept",
    TORCH_SAVE: "`torch.save` and fsync, a file a rank",
}
INK, PALE_INK, OURS, THEIRS, MARK = "#24292f", "#6e7781", "#0b7a75", "#c3cad1", "#c2410c"

Line = dict[str, Any]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", type=Path, help="file whose figures are written anew")
    parser.add_argument("--mpi", default="MPICH", help="whose times the plot shows (MPICH)")
    parser.add_argument("--png", action="store_true", help="draw a PNG beside the SVG")
    arguments = parser.parse_args()
    steps = newest("step", STEP_NUMEL)
    memory, faces = newest("memory", MEMORY_NUMEL), newest("faces", STEP_NUMEL)
    checkpoints = newest("checkpoint", nbytes_per_rank=CHECKPOINT_NBYTES)
    drawn = [line for line in steps if line["mpi"].startswith(arguments.mpi)]
    if drawn:
        draw_step_time(drawn, [".svg", ".png"] if arguments.png else [".svg"])
    nodes = [line for count in (4, 2) for line in newest("nodes", NODES_NUMEL, nodes=count)]
    text = "\n\n".join(figures(steps, memory, faces, checkpoints, nodes))
    print(text)
    if arguments.readme is not None:
        rewrite(arguments.readme, text)


def newest(benchmark: str, numel: int | None = None, **settings: int) -> list[Line]:
    """Read the newest line for each number of ranks and each MPI, quiet ones first.

    Args:
        benchmark: Name of the file.
        numel: Only results of models of this size; None takes all.
        **settings: Only results of these settings.
    """
    path = RESULTS_FOLDER / f"{benchmark}.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines = [line for line in lines if numel in (None, line["numel"])]
    lines = [line for line in lines if settings.items() <= line["settings"].items()]
    lines.sort(key=lambda line: ((line["others"] or 0.0) <= QUIET, line["date"]))
    last = {(line["ranks"], line["mpi"].split()[0]): line for line in lines}
    return [last[kind] for kind in sorted(last)]


# -- the plot --------------------------------------------------------------------------------------


def draw_step_time(lines: Sequence[Line], suffixes: Sequence[str]) -> None:
    """Draw a panel of bars for each number of ranks."""
    mpl.rcParams.update(
        {"font.size": 10, "text.color": INK, "svg.hashsalt": "shardopt", "svg.fonttype": "none"}
    )
    figure, axes = plt.subplots(
        1, len(lines), figsize=(4.9 * len(lines) + 0.6, 3.5), squeeze=False, sharey=True
    )
    for axis, line in zip(axes[0], lines, strict=True):
        _draw_panel(axis, line)
    model = f"{lines[0]['numel'] / 2**20:.0f} Mi {lines[0]['dtype']} parameters"
    title = f"One optimizer step, {model}, gradients averaged over the ranks"
    figure.suptitle(title, x=0.012, y=0.975, ha="left", weight="bold", size=11.5)
    figure.text(0.012, 0.022, footnote(lines), size=7.5, color=PALE_INK, linespacing=1.5)
    figure.tight_layout(rect=(0, 0.1, 1, 0.97), w_pad=2.5)
    PLOTS_FOLDER.mkdir(exist_ok=True)
    for suffix in suffixes:
        metadata = {"Date": None} if suffix == ".svg" else None
        path = PLOTS_FOLDER / f"step_time{suffix}"
        figure.savefig(path, facecolor="white", dpi=150, metadata=metadata)
    plt.close(figure)


def _draw_panel(axis: Any, line: Line) -> None:
    names = [name for name in CONTENDERS if name in line["samples_s"]]
    values = [nanoseconds(line, name) for name in names]
    colors = [OURS if name == SHARDOPT else THEIRS for name in names]
    axis.barh(range(len(names)), values, color=colors, height=0.62)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        times = "" if name == SHARDOPT else f"   {value / values[0]:.1f} ×"
        weight = "bold" if name == SHARDOPT else "normal"
        axis.text(value + 0.015 * max(values), place, f"{value:.2f} ns{times}", va="center",
                  weight=weight)  # fmt: skip
    limit = line["figures"][LIMIT]
    axis.axvline(limit, color=MARK, lw=1.2, ls=(0, (4, 2)), zorder=3)
    axis.annotate(
        f"limit of memory: {limit:.2f} ns", (limit, -0.62), (5, 0), textcoords="offset points",
        color=MARK, size=8.5, va="center",
    )  # fmt: skip
    axis.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axis.set_ylim(len(names) - 0.45, -0.9)
    axis.set_xlim(0, 1.32 * max(values))
    axis.set_title(f"{line['ranks']} ranks", loc="left", size=10.5)
    axis.set_xlabel("ns per parameter (less is better)", color=PALE_INK)
    axis.tick_params(length=0, colors=INK)
    axis.tick_params(axis="x", colors=PALE_INK)
    axis.grid(axis="x", color="#eaeef2")
    axis.set_axisbelow(True)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)


def footnote(lines: Sequence[Line]) -> str:
    """Say where the times come from."""
    first = lines[0]
    machine, versions = first["machine"], first["versions"]
    peers = f"torch {versions['torch']} over Gloo, " if "torch" in versions else ""
    rounds = min(len(samples) for line in lines for samples in line["samples_s"].values())
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    return (
        f"{machine['cpu']}, {machine['cores']} cores. {first['mpi']}, {peers}"
        f"NumPy {versions['numpy']}, Numba {versions['numba']}. Commit {commits}, "
        f"{first['date'][:10]}.\nTime of the slowest rank, median of {rounds} interleaved rounds. "
        "Limit: the bytes a step must move, at the bandwidth all ranks reached in the same run."
    )


def nanoseconds(line: Line, name: str) -> float:
    """Median time of a contender for each parameter."""
    return float(median(line["samples_s"][name]) / line["numel"] * 1e9)


# -- the tables ------------------------------------------------------------------------------------


def figures(
    steps: Sequence[Line],
    memory: Sequence[Line],
    faces: Sequence[Line],
    checkpoints: Sequence[Line],
    nodes: Sequence[Line],
) -> list[str]:
    """Write the README's part: the picture, the tables, where they come from."""
    parts: list[str] = []
    if steps:
        alt = "Time of a step for each parameter: shardopt and its peers, on 2 and on 4 ranks"
        parts += [f"![{alt}](benchmarks/plots/step_time.svg)", step_table(steps)]
        parts.append(
            "The limit is the bytes that a step must move, at the bandwidth of a simple loop, an "
            "axpy, on all ranks in the same run; a step, which reads more streams, may pass it. "
            f"Best and worst of all rounds are in `benchmarks/results`. {_origin(steps)}"
        )
    if nodes:
        parts += [
            nodes_table(nodes),
            "Nodes are network namespaces of one machine, which share its cores; links carry "
            "1 Gbit/s each way. In parentheses: how many times the limit, the same bytes over bare "
            f"TCP; for others, how many times shardopt. {_origin(nodes)}",
        ]
    if memory:
        parts += [memory_table(memory), f"GradNorm as proportional set size. {_origin(memory)}"]
    if faces:
        parts += [faces_table(faces), _origin(faces)]
    if checkpoints:
        parts += map(checkpoint_table, checkpoints)
        parts.append(
            "In parentheses: how many times the limit. That is a memcpy of as many bytes on all "
            "ranks at once; a direct write of them, with as many requests in flight, and an fsync, "
            f"in which the disk gave {_disk_speeds(checkpoints)} GB/s; a read that verifies "
            "nothing; a step with nothing beside it. Loads are from the page cache. "
            f"{_origin(checkpoints)}"
        )
    return parts


def step_table(lines: Sequence[Line]) -> str:
    """Write step times in ns a parameter, and how many times shardopt's they are."""
    rows = []
    for line in lines:
        ours = nanoseconds(line, SHARDOPT)
        cells = [_setting(line), f"**{ours:.2f}**"]
        for name in CONTENDERS[1:]:
            there = name in line["samples_s"]
            value = nanoseconds(line, name) if there else 0.0
            cells.append(f"{value:.2f} ({value / ours:.1f} ×)" if there else "")
        limit = line["figures"][LIMIT]
        rows.append([*cells, f"{limit:.2f} ({ours / limit:.2f})"])
    head = ["Step, ns per parameter", *_heads(), "limit of memory (shardopt / limit)"]
    return _markdown(head, rows)


def memory_table(lines: Sequence[Line]) -> str:
    """Write the memory that a node needs, in bytes a parameter."""
    rows = []
    for line in lines:
        found = line["figures"]
        cells = [_setting(line)]
        for name in CONTENDERS:
            value = found.get(BYTES_PER_PARAMETER.format(name))
            cells.append("" if value is None else f"{value:.1f}")
        cells[1] = f"**{cells[1]}**"
        rows.append(cells)
    head = ["Memory of a node, bytes per parameter (= GB per 10⁹ parameters)", *_heads()]
    return _markdown(head, rows)


def nodes_table(lines: Sequence[Line]) -> str:
    """Write step times between nodes in ms, and the share of the exchange that backward hides."""
    rows = []
    for line in lines:
        times = {name: 1e3 * median(values) for name, values in line["samples_s"].items()}
        ratios = {ratio["name"]: ratio["value"] for ratio in line["ratios"]}
        ours, place = times[SHARDOPT], line["settings"]
        limit = max(times[WIRE], times[UPDATE_ALONE])
        cells = [f"{place['nodes']} nodes x {place['node_size']}, {line['mpi']}"]
        cells.append(f"**{ours:.0f} ({ours / limit:.2f})**")
        cells += [f"{times[name]:.0f}" for name in (NARROW_WIRE, NARROW)]
        for name in (REDUCE_SCATTER, ZERO_REDUNDANCY):
            cells.append(f"{times[name]:.0f} ({times[name] / ours:.1f} ×)" if name in times else "")
        hidden = ratios.get(HIDDEN)
        rows.append([*cells, "" if hidden is None else f"{100 * hidden:.0f} %"])
    head = ["Step between nodes, ms", "shardopt", "bfloat16 wire", "bfloat16 parameters and wire"]
    head += [LABELS[name].replace("\n", " ") for name in (REDUCE_SCATTER, ZERO_REDUNDANCY)]
    return _markdown([*head, "exchange hidden behind backward"], rows)


def faces_table(lines: Sequence[Line]) -> str:
    """Write the time of a step through each framework, in ns a parameter."""
    rows = []
    for name, label in FRAMEWORKS.items():
        there = [name in line["samples_s"] for line in lines]
        if any(there):
            cells = [
                f"{nanoseconds(line, name):.2f}" if has else ""
                for line, has in zip(lines, there, strict=True)
            ]
            rows.append([label, *cells])
    head = ["Step through each framework, ns per parameter"]
    return _markdown([*head, *map(_setting, lines)], rows)


def checkpoint_table(line: Line) -> str:
    """Write what it costs to save and load, in seconds, for one number of ranks."""
    whats = (STALL, CPU, DURABLE, LOAD, BESIDE.format("{}", STEP))
    limits = [
        median(line["samples_s"][name]) if name else None
        for name in (MEMCPY, None, DIRECT_WRITE, BARE_READ, STEP)
    ]
    rows = []
    for name, label in SAVERS.items():
        times = [line["samples_s"].get(what.format(name)) for what in whats]
        if any(times):
            cells = [
                f"{median(each):.2f}{f' ({median(each) / limit:.2f})' if limit else ''}"
                if each
                else ""
                for each, limit in zip(times, limits, strict=True)
            ]
            rows.append([label, *(f"**{cell}**" if name == SHARDOPT else cell for cell in cells)])
    rows.append(["limit", *(f"{limit:.2f}" if limit else "" for limit in limits)])
    size = f"{line['settings']['nbytes_per_rank'] / 2**30:g} GiB a rank"
    head = [f"Checkpoint of {size}, {_setting(line)}; seconds"]
    columns = ("training waits", "CPU of a rank", "durable after", "load", "a step meanwhile")
    return _markdown([*head, *columns], rows)


def rewrite(readme: Path, text: str) -> None:
    """Put ``text`` between the markers of a file.

    Raises:
        ValueError: The file has no such markers.
    """
    old = readme.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{readme} must have {BEGIN} and {END}; got neither. Put both in.")
    readme.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", old, count=1))


def _setting(line: Line) -> str:
    cores = line["machine"]["cores"]
    crowded = f" on {cores} cores" if line["ranks"] > cores else ""
    ranks = "1 rank" if line["ranks"] == 1 else f"{line['ranks']} ranks"
    return f"{ranks}{crowded}, {line['mpi']}"


def _disk_speeds(lines: Sequence[Line]) -> str:
    speeds = [
        line["ranks"] * line["settings"]["nbytes_per_rank"]
        / median(line["samples_s"][DIRECT_WRITE]) / 1e9
        for line in lines
    ]  # fmt: skip
    return " and ".join(f"{speed:.1f}" for speed in speeds)


def _heads() -> list[str]:
    return [LABELS[name].replace("\n", " ") for name in CONTENDERS]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _origin(lines: Sequence[Line]) -> str:
    machine, date = lines[0]["machine"], lines[0]["date"][:10]
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    return f"{machine['cpu']}, {machine['cores']} cores, {date}, commit {commits}."


if __name__ == "__main__":
    main()
