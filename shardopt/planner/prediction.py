"""Steps that ``benchmarks predict`` measured beside simulated ones, and a machine fitted to them.

[Note: what predictions are held to]
Speeds are fitted to steps on 2 and 4 nodes of one rank, with the default bucket and with the
smallest one. All other steps are predicted: on 8 nodes, on nodes of 2 ranks, with other buckets,
with a link at half rate and with a late rank. The memory and the barrier of nodes are always those
that ``shardopt doctor --calibrate`` found on the same layout, as the hosts share one machine.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import geometric_mean, median
from typing import Any

from shardopt.errors import PlanError
from shardopt.layout.partition import plan_partition
from shardopt.planner.estimate import Layout, StepTimes
from shardopt.planner.machine import Machine, make_machine
from shardopt.planner.model import evenly
from shardopt.planner.simulate import NodeKind

GOOD_ERROR = 0.2
"""A prediction may be this far from what is measured, relative to it."""

MAX_BUSY = 0.5
"""A step whose traffic and updates take more of the cores is bound by them: it is not fitted."""

_NUM_TENSORS = 32  # as in the benchmark
_STEP, _BUCKETS = "step", "step, buckets of {} KiB"
_WIRE, _ALONE = "its bytes over bare TCP", "update alone, nothing sent"
_KINDS: Mapping[str, NodeKind] = {
    "step, a link at half rate": NodeKind(link_slowdown=2.0),
    "step, a rank 50 ms late": NodeKind(late_s=0.05),
}
_FITTED = ("link_nbytes_per_s", "latency_s", "message_s")
_FITTED_NODES, _SMALLEST_KIB = (2, 4), 64
_PRIOR = 0.05  # weight of what was calibrated, against a relative error of a step
_TURNS = 30  # of the search


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A kind of step as it was measured.

    Attributes:
        key: Its name in the results.
        layout: The job, with its stragglers.
        numel: Parameters of the model, in float32.
        measured_s: Seconds of a step.
        busy_share: The share of the machine's cores that its traffic and updates take.
        machine: As calibrated on the same layout.
    """

    key: str
    layout: Layout
    numel: int
    measured_s: float
    busy_share: float
    machine: Machine = field(repr=False)

    @property
    def is_fitted(self) -> bool:
        """Whether speeds are fitted to it; see [Note: what predictions are held to]."""
        layout, smallest = self.layout, _BUCKETS.format(_SMALLEST_KIB)
        return (
            layout.num_nodes in _FITTED_NODES
            and layout.node_size == 1
            and self.key in (_STEP, smallest)
            and not self.is_cpu_bound
        )

    @property
    def is_cpu_bound(self) -> bool:
        """Whether hosts that share the cores are held up by them; never on one node."""
        return self.layout.num_nodes > 1 and self.busy_share > MAX_BUSY

    def simulate(self, machine: Machine) -> float:
        """Return the seconds of a step on another machine."""
        specs = evenly(self.numel, "float32", _NUM_TENSORS).specs
        layout = self.layout
        partition = plan_partition(specs, layout.num_nodes, layout.node_size, layout.bucket)
        return StepTimes.of(partition, layout, machine).run(layout).step_s

    def with_link_of(self, machine: Machine) -> Machine:
        """Return the calibrated machine with what is fitted of another one."""
        return replace(
            self.machine,
            link_nbytes_per_s=machine.link_nbytes_per_s,
            latency_s=machine.latency_s,
            message_s=machine.message_s,
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """A measured step beside simulated ones.

    Attributes:
        step: As measured.
        fitted_s: Seconds with the speeds fitted on 2 and 4 nodes; None on one node.
        calibrated_s: Seconds with the speeds calibrated on the same layout.
    """

    step: MeasuredStep
    fitted_s: float | None
    calibrated_s: float

    def error(self, simulated_s: float) -> float:
        """Return how far a simulated time is from the measured one, relative to it."""
        return simulated_s / self.step.measured_s - 1


def read_steps(lines: Iterable[Mapping[str, Any]]) -> list[MeasuredStep]:
    """Read results; of a layout the last line counts.

    Args:
        lines: Of ``benchmarks/results/predict.jsonl``.

    Raises:
        PlanError: A line is of another benchmark.
    """
    found: dict[tuple[int, int], list[MeasuredStep]] = {}
    for line in lines:
        if line["benchmark"] != "predict":
            raise PlanError(
                f"results must be those of benchmarks predict; got {line['benchmark']}. Pass the "
                "lines of benchmarks/results/predict.jsonl."
            )
        settings = line["settings"]
        found[settings["nodes"], settings["node_size"]] = _read_line(line)
    return [step for _, steps in sorted(found.items()) for step in steps]


def _read_line(line: Mapping[str, Any]) -> list[MeasuredStep]:
    figures, settings, samples = line["figures"], line["settings"], line["samples_s"]
    calibration = {
        name.removeprefix("calibrated "): value
        for name, value in figures.items()
        if name.startswith("calibrated ")
    }
    layout = Layout(settings["nodes"], settings["node_size"])
    machine = make_machine({}, calibration, None, layout.num_nodes)
    computed_s = sum(figures.get(f"{key}: CPU seconds of all ranks", 0) for key in (_WIRE, _ALONE))
    steps = []
    for key, values in samples.items():
        if key in (_WIRE, _ALONE):
            continue
        measured_s = median(values)
        busy_share = computed_s / measured_s / line["machine"]["cores"]
        job = _layout_of(key, layout)
        steps.append(MeasuredStep(key, job, line["numel"], measured_s, busy_share, machine))
    return steps


def _layout_of(key: str, layout: Layout) -> Layout:
    if key in _KINDS:
        return replace(layout, stragglers=(_KINDS[key],))
    if key == _STEP:
        return layout
    kib = int(key.removeprefix("step, buckets of ").removesuffix(" KiB"))
    return replace(layout, policy=replace(layout.policy, bucket_nbytes=kib << 10))


def fit_machine(steps: Sequence[MeasuredStep]) -> Machine:
    """Fit link, latency and cost per message to those steps that are for it.

    The squares of logarithms of simulated over measured times are minimised. Where times say
    nothing about a speed, it stays near the one that was calibrated, whose square counts a little.

    Args:
        steps: Measured ones.

    Returns:
        A machine of which only what is fitted counts.

    Raises:
        PlanError: None of the steps is for it.
    """
    fitted = [step for step in steps if step.is_fitted]
    if not fitted:
        raise PlanError(
            "steps must have some on 2 or 4 nodes of one rank to fit speeds to; got none. Run: "
            "python -m benchmarks predict."
        )
    start = [geometric_mean(getattr(s.machine, name) for s in fitted) for name in _FITTED]

    def machine_at(logs: Sequence[float]) -> Machine:
        link, latency_s, message_s = (v * math.exp(log) for v, log in zip(start, logs, strict=True))
        return replace(
            fitted[0].machine,
            link_nbytes_per_s=link,
            latency_s=latency_s,
            message_s=message_s,
        )

    def misfit(logs: Sequence[float]) -> float:
        machine = machine_at(logs)
        errors = [math.log(s.simulate(s.with_link_of(machine)) / s.measured_s) for s in fitted]
        return sum(error**2 for error in errors) + sum((_PRIOR * log) ** 2 for log in logs)

    return machine_at(_minimize(misfit, len(start)))


def _minimize(misfit: Callable[[Sequence[float]], float], count: int) -> list[float]:
    """Search from the origin along one axis after the other, in steps that grow and shrink."""
    place, lowest = [0.0] * count, misfit([0.0] * count)
    sizes = [0.5] * count
    for _ in range(_TURNS):
        for axis in range(count):
            for sign in (1, -1):
                moved = [*place]
                moved[axis] += sign * sizes[axis]
                value = misfit(moved)
                if value < lowest:
                    place, lowest = moved, value
                    sizes[axis] *= 1.5
                    break
            else:
                sizes[axis] /= 2
        if max(sizes) < 1e-3:
            break
    return place


def predict(steps: Sequence[MeasuredStep]) -> tuple[Machine, list[Prediction]]:
    """Fit a machine, and predict all steps; see [Note: what predictions are held to].

    Returns:
        The machine, and a prediction for each step.
    """
    machine = fit_machine(steps)
    return machine, [
        replace(each, fitted_s=each.step.simulate(each.step.with_link_of(machine)))
        if each.step.layout.num_nodes > 1
        else each
        for each in predict_calibrated(steps)
    ]


def predict_calibrated(steps: Iterable[MeasuredStep]) -> list[Prediction]:
    """Predict steps with the speeds that were calibrated on the same layout, and with no others."""
    return [Prediction(step, None, step.simulate(step.machine)) for step in steps]
