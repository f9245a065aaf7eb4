"""Markdown tables of the newest results, and of the targets."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import PLOTS_FOLDER, ROOT
from benchmarks.cases import CASES
from benchmarks.cases.checkpoint import STEP, beside, cpu, durable, load, stall
from benchmarks.cases.memory import bytes_per_parameter
from benchmarks.cases.nodes import HIDDEN, NARROW, NARROW_WIRE, UPDATE_ALONE, WIRE
from benchmarks.cases.step import LIMIT
from benchmarks.cases.training import TRAINERS, held_out_bits, tokens_per_s
from benchmarks.contenders.names import (
    BARE_READ,
    DCP,
    DCP_KEPT,
    DIRECT_WRITE,
    MEMCPY,
    REDUCE_SCATTER,
    REPLICATED,
    SHARDOPT,
    THROUGH_JAX,
    THROUGH_LUCID,
    THROUGH_TORCH,
    THROUGH_TORCH_BFLOAT16,
    TORCH_SAVE,
    ZERO_REDUNDANCY,
)
from benchmarks.harness.case import Case
from benchmarks.harness.record import newest, read
from benchmarks.harness.result import Result

PLOTS = {
    "step": PLOTS_FOLDER / "step_time.svg",
    "training": PLOTS_FOLDER / "training_loss.svg",
}
FIGURES = "figures"
TARGETS = "targets"

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


@dataclass(frozen=True)
class Figures:
    """The results that tables and plot show: the newest of each case that its targets are for.

    Attributes:
        steps: Whole steps, one result for each number of ranks and each MPI; likewise below.
        training: Whole training.
        nodes: Steps over several nodes, most nodes first.
        memory: Memory of a node.
        faces: Steps through each framework.
        checkpoints: Checkpoints.
    """

    steps: Sequence[Result]
    training: Sequence[Result]
    nodes: Sequence[Result]
    memory: Sequence[Result]
    faces: Sequence[Result]
    checkpoints: Sequence[Result]


def read_figures(folder: Path) -> Figures:
    """Read the results to be shown from a folder."""
    found = {name: _claimed(case, folder) for name, case in CASES.items()}
    nodes: dict[int, list[Result]] = {}
    for result in found["nodes"]:
        if result.has(SHARDOPT):  # those of ``--only`` leave out whole steps
            nodes.setdefault(result.settings["nodes"], []).append(result)
    return Figures(
        steps=newest(found["step"]),
        training=newest(found["training"]),
        nodes=[result for count in sorted(nodes, reverse=True) for result in newest(nodes[count])],
        memory=newest(found["memory"]),
        faces=newest(found["faces"]),
        checkpoints=newest(found["checkpoint"]),
    )


def _claimed(case: Case, folder: Path) -> list[Result]:
    return [result for result in read(case, folder) if case.claim.covers(result)]


def nanoseconds(result: Result, name: str) -> float:
    """Return the median time of a contender for each parameter."""
    return result.value(name) / result.numel * 1e9


def targets_table(cases: Mapping[str, Case]) -> str:
    """Write all ratios that have a target, case by case."""
    rows = [
        [case.name, f"`{ratio.name.replace('{ranks}', 'ranks')}`", str(ratio.target)]
        for case in cases.values()
        for ratio in case.ratios
        if ratio.target is not None
    ]
    return _markdown(["Case", "Ratio", "Target"], rows, aligned="---")


def figures_text(figures: Figures, folder: Path = ROOT) -> str:
    """Write the plot's link, the tables, and where they come from.

    Args:
        figures: The results to be shown.
        folder: The folder that the link starts from.
    """
    parts: list[str] = []
    if figures.steps:
        alt = "Time of a step for each parameter: shardopt and its peers, on 2 and on 4 ranks"
        link = os.path.relpath(PLOTS["step"], folder.resolve())
        parts += [f"![{alt}]({link})", step_table(figures.steps)]
        parts.append(
            "The limit is the time to move the bytes of a step at the bandwidth of a simple loop, "
            "an axpy, on all ranks in the same run. A step reads more streams than that loop, so "
            "it can beat the limit. The best and worst of all rounds are in `benchmarks/results`. "
            f"{_origin(figures.steps)}"
        )
    if figures.training:
        alt = "Held-out loss over seconds of training: shardopt and its peers"
        link = os.path.relpath(PLOTS["training"], folder.resolve())
        parts += [f"![{alt}]({link})", training_table(figures.training)]
        parts.append(
            "All train the same model on the same text and reach the same losses, a few sequences "
            "in each step: the more tokens a step has, the less the optimizer matters. In "
            "parentheses: how many times as fast shardopt is. The loss is in held-out bits per "
            "byte. "
            f"{_origin(figures.training)}"
        )
    if figures.nodes:
        parts += [
            nodes_table(figures.nodes),
            "The nodes are network namespaces of one machine and share its cores; the links carry "
            "1 Gbit/s each way. In parentheses: for shardopt, the ratio to the limit, which is the "
            "same bytes over bare TCP; for the others, the ratio to shardopt. "
            f"{_origin(figures.nodes)}",
        ]
    if figures.memory:
        measured = f"Measured as proportional set size (PSS). {_origin(figures.memory)}"
        parts += [memory_table(figures.memory), measured]
    if figures.faces:
        parts += [faces_table(figures.faces), _origin(figures.faces)]
    if figures.checkpoints:
        parts += [*map(checkpoint_table, figures.checkpoints), _about(figures.checkpoints)]
    return "\n\n".join(parts)


def _about(checkpoints: Sequence[Result]) -> str:
    return (
        "In parentheses: the ratio to the limit. The limits are, column by column: a memcpy of the "
        "same number of bytes on all ranks at once; a direct write of them, with as many requests "
        f"in flight, and an fsync, which reached {_disk_speeds(checkpoints)} GB/s on this disk; a "
        "read that verifies nothing; and a step that runs alone. Loads are served from the page "
        f"cache. {_origin(checkpoints)}"
    )


def step_table(results: Sequence[Result]) -> str:
    """Write step times in ns a parameter, and how many times shardopt's they are."""
    rows = []
    for result in results:
        ours = nanoseconds(result, SHARDOPT)
        cells = [_setting(result), f"**{ours:.2f}**"]
        for name in CONTENDERS[1:]:
            value = nanoseconds(result, name) if result.has(name) else None
            cells.append("" if value is None else f"{value:.2f} ({value / ours:.1f} ×)")
        limit = result.value(LIMIT)
        rows.append([*cells, f"{limit:.2f} ({ours / limit:.2f})"])
    head = ["Step, ns per parameter", *_heads(), "limit of memory (shardopt / limit)"]
    return _markdown(head, rows)


def training_table(results: Sequence[Result]) -> str:
    """Write the tokens that each contender learns from in a second, and the loss at the end."""
    rows = []
    for result in results:
        ours = result.value(tokens_per_s(THROUGH_TORCH))
        cells = [_setting(result), f"**{ours:.0f}**"]
        for name in TRAINERS[1:]:
            value = result.value(tokens_per_s(name)) if result.has(tokens_per_s(name)) else None
            cells.append("" if value is None else f"{value:.0f} ({ours / value:.2f} ×)")
        rows.append([*cells, f"{result.curves[held_out_bits(THROUGH_TORCH)][-1]:.2f}"])
    size = f"Training a GPT of {results[0].numel / 1e6:.0f} M parameters, tokens/s"
    return _markdown([size, "shardopt", *TRAINERS[1:], "loss at the end"], rows)


def memory_table(results: Sequence[Result]) -> str:
    """Write the memory that a node needs, in bytes a parameter."""
    rows = []
    for result in results:
        keys = [bytes_per_parameter(name) for name in CONTENDERS]
        cells = [f"{result.value(key):.1f}" if result.has(key) else "" for key in keys]
        rows.append([_setting(result), f"**{cells[0]}**", *cells[1:]])
    head = ["Memory of a node, bytes per parameter (= GB per 10⁹ parameters)", *_heads()]
    return _markdown(head, rows)


def nodes_table(results: Sequence[Result]) -> str:
    """Write step times between nodes in ms, and the share of the exchange that backward hides."""
    rows = []
    for result in results:
        ours, place = result.value(SHARDOPT), result.settings
        limit = max(result.value(WIRE), result.value(UPDATE_ALONE))
        cells = [f"{place['nodes']} nodes x {place['node_size']}, {result.origin.mpi}"]
        cells.append(f"**{1e3 * ours:.0f} ({ours / limit:.2f})**")
        cells += [f"{1e3 * result.value(name):.0f}" for name in (NARROW_WIRE, NARROW)]
        for name in (REDUCE_SCATTER, ZERO_REDUNDANCY):
            value = result.value(name) if result.has(name) else None
            cells.append("" if value is None else f"{1e3 * value:.0f} ({value / ours:.1f} ×)")
        verdicts = {verdict.name: verdict.value for verdict in CASES["nodes"].judge(result)}
        hidden = verdicts.get(HIDDEN)
        rows.append([*cells, "" if hidden is None else f"{100 * hidden:.0f} %"])
    head = ["Step between nodes, ms", "shardopt", "bfloat16 wire", "bfloat16 parameters and wire"]
    head += [LABELS[name].replace("\n", " ") for name in (REDUCE_SCATTER, ZERO_REDUNDANCY)]
    return _markdown([*head, "exchange hidden behind backward"], rows)


def faces_table(results: Sequence[Result]) -> str:
    """Write the time of a step through each framework, in ns a parameter."""
    rows = [
        [label, *(f"{nanoseconds(r, name):.2f}" if r.has(name) else "" for r in results)]
        for name, label in FRAMEWORKS.items()
        if any(r.has(name) for r in results)
    ]
    head = ["Step through each framework, ns per parameter"]
    return _markdown([*head, *map(_setting, results)], rows)


def checkpoint_table(result: Result) -> str:
    """Write the cost of saving and loading, in seconds, for one number of ranks."""
    bounds = (MEMCPY, None, DIRECT_WRITE, BARE_READ, STEP)
    limits = [result.value(key) if key else None for key in bounds]
    rows = []
    for name, label in SAVERS.items():
        keys = [stall(name), cpu(name), durable(name), load(name), beside(name, STEP)]
        if any(map(result.has, keys)):
            cells = [_cell(result, key, limit) for key, limit in zip(keys, limits, strict=True)]
            rows.append([label, *(f"**{cell}**" if name == SHARDOPT else cell for cell in cells)])
    rows.append(["limit", *(f"{limit:.2f}" if limit else "" for limit in limits)])
    size = f"{result.settings['nbytes_per_rank'] / 2**30:g} GiB a rank"
    head = [f"Checkpoint of {size}, {_setting(result)}; seconds"]
    columns = ("training waits", "CPU of a rank", "durable after", "load", "a step meanwhile")
    return _markdown([*head, *columns], rows)


def _cell(result: Result, key: str, limit: float | None) -> str:
    if not result.has(key):
        return ""
    value = result.value(key)
    return f"{value:.2f} ({value / limit:.2f})" if limit else f"{value:.2f}"


def rewrite(path: Path, part: str, text: str) -> None:
    """Replace the text between the markers of a part of a Markdown file.

    Args:
        path: The file.
        part: ``FIGURES`` or ``TARGETS``.
        text: The new text.

    Raises:
        ValueError: The file has no such markers.
    """
    begin, end = f"<!-- {part} begin -->", f"<!-- {part} end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    old = path.read_text()
    if not pattern.search(old):
        raise ValueError(f"{path} must have {begin} and {end}; got neither. Put both in.")
    path.write_text(pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", old, count=1))


def _setting(result: Result) -> str:
    cores = result.origin.machine["cores"]
    crowded = f" on {cores} cores" if result.ranks > cores else ""
    ranks = "1 rank" if result.ranks == 1 else f"{result.ranks} ranks"
    return f"{ranks}{crowded}, {result.origin.mpi}"


def _disk_speeds(results: Sequence[Result]) -> str:
    speeds = [
        result.ranks * result.settings["nbytes_per_rank"] / result.value(DIRECT_WRITE) / 1e9
        for result in results
    ]
    return " and ".join(f"{speed:.1f}" for speed in speeds)


def _heads() -> list[str]:
    return [LABELS[name].replace("\n", " ") for name in CONTENDERS]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], aligned: str = "---:") -> str:
    lines = [head, ["---", *[aligned] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _origin(results: Sequence[Result]) -> str:
    machine, date = results[0].origin.machine, results[0].origin.date[:10]
    commits = ", ".join(dict.fromkeys(result.origin.commit for result in results))
    return f"{machine['cpu']}, {machine['cores']} cores, {date}, commit {commits}."
