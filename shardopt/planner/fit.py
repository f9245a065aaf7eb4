"""Measured steps beside simulated ones, for fitting a machine to what was measured."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from shardopt.errors import PlanError
from shardopt.planner.estimate import Layout, estimate
from shardopt.planner.machine import Machine
from shardopt.planner.model import evenly

_NUM_TENSORS = 32  # as in the benchmark
_STEP, _BACKWARD = "shardopt", "backward"
_OVERLAPPED, _BARE = "backward and step: overlap=True", "its bytes over bare TCP"
_ALONE = "update alone, nothing sent"
_BUCKET_MIB = "MiB in a bucket"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One line of results of ``benchmarks nodes``, and the same job simulated.

    Attributes:
        layout: The job.
        mpi: The MPI library it was measured with.
        step_s: Measured seconds of a step, and simulated ones.
        hidden_s: The same of what overlap hides; None where it was not measured.
    """

    layout: Layout
    mpi: str
    step_s: tuple[float, float]
    hidden_s: tuple[float, float] | None

    @property
    def ratio(self) -> float:
        """Simulated over measured time of a step."""
        return self.step_s[1] / self.step_s[0]


def machine_of(line: Mapping[str, Any], machine: Machine) -> Machine:
    """Return a machine with the speeds that a line itself measured: link and memory.

    The link is that of the same bytes over bare TCP, and memory that of an update that sends
    nothing, on all nodes at once. Latency and cost per message are those of the given machine, as
    no line has them.

    Args:
        line: A line of ``benchmarks/results/nodes.jsonl``.
        machine: Has the other speeds.

    Raises:
        PlanError: It lacks one of these samples.
    """
    layout, samples = _layout_of(line), line["samples_s"]
    if _BARE not in samples or _ALONE not in samples:
        raise PlanError(
            f"a line of results must have samples of {_BARE!r} and {_ALONE!r}; got "
            f"{', '.join(samples)}. Run: python -m benchmarks nodes."
        )
    model = evenly(line["numel"], line["dtype"], _NUM_TENSORS)
    nbytes = 2 * 4 * model.numel * (layout.num_nodes - 1) / layout.num_nodes
    updated_nbytes = (4 + 24) * model.numel / layout.num_nodes  # of float32, on each node
    return replace(
        machine,
        link_nbytes_per_s=nbytes / median(samples[_BARE]),
        memory_nbytes_per_s=updated_nbytes / median(samples[_ALONE]),
    )


def compare(
    lines: Iterable[Mapping[str, Any]], machine: Machine, *, own_speeds: bool = True
) -> list[Comparison]:
    """Simulate the jobs of measured results.

    Args:
        lines: Lines of ``benchmarks/results/nodes.jsonl``; those of other benchmarks are left out.
        machine: Its speeds.
        own_speeds: Whether each line's own link and memory replace the machine's.
    """
    found = []
    for line in lines:
        samples = line["samples_s"]
        if line["benchmark"] != "nodes" or line["dtype"] != "float32" or _STEP not in samples:
            continue
        layout = _layout_of(line)
        backward_s = median(samples[_BACKWARD]) if _OVERLAPPED in samples else 0.0
        planned = estimate(
            evenly(line["numel"], line["dtype"], _NUM_TENSORS),
            replace(layout, backward_s=backward_s),
            machine_of(line, machine) if own_speeds else machine,
        )
        step_s, hidden_s = median(samples[_STEP]), None
        if backward_s:
            behind_s = median(samples[_OVERLAPPED]) - backward_s
            hidden_s = step_s - behind_s, planned.hidden_s
        found.append(Comparison(layout, line["mpi"], (step_s, planned.simulated.step_s), hidden_s))
    return found


def _layout_of(line: Mapping[str, Any]) -> Layout:
    settings, figures = line["settings"], line["figures"]
    bucket = int(figures[_BUCKET_MIB] * (1 << 20)) if _BUCKET_MIB in figures else None
    return Layout(settings["nodes"], settings["node_size"], bucket)
