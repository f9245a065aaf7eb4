"""The settings that take less memory, what each of them leaves, and which one makes a job fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from shardopt.backends.devices import HOST
from shardopt.combinations import Job, why_not
from shardopt.errors import HyperparamsError, PartitionError
from shardopt.layout.footprint import MemoryReport
from shardopt.params.forms import FormRules
from shardopt.planner.estimate import Layout, lay_out, memory_of
from shardopt.planner.machine import Gpu
from shardopt.planner.model import Model

AS_PLANNED, TOGETHER = "as planned", "all of these"

CANDIDATES: Sequence[tuple[Mapping[str, Any], str]] = (
    ({"stage": 2}, "work in backward"),
    ({"accumulate": "exact"}, "each backward sends its gradients"),
    ({"stage": 2, "update_in_backward": True}, "no clipping, no accumulation"),
    ({"optim_bits": 8}, "moments are rounded"),
    ({"master_weights": False}, "updates are rounded by chance"),
    ({"offload": "cpu"}, "CPUs update"),
)
"""Settings of ``ShardPolicy`` that take less memory, the cheapest first, and what they cost."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The memory that there is.

    Attributes:
        node_nbytes: Of a node, or None if it is not given.
        gpu: The GPU of each rank, or None.
    """

    node_nbytes: int | None
    gpu: Gpu | None

    def fit(self, memory: MemoryReport) -> bool:
        """Whether there is enough for what training takes."""
        on_node = self.node_nbytes is None or memory.node_nbytes <= self.node_nbytes
        on_gpu = self.gpu is None or memory.device_rank_nbytes <= self.gpu.memory_nbytes
        return on_node and on_gpu


@dataclass(frozen=True, slots=True)
class Setting:
    """A job with another setting.

    Attributes:
        name: As it is written in ``ShardPolicy``, or the number of nodes.
        costs: What one pays for it.
        node_nbytes: Memory of a node; None if the setting is refused.
        device_rank_nbytes: On the GPU of each rank; 0 without, None likewise.
        fits: Whether there is enough of both.
        refused: Why the optimizer refuses it in this job, or None.
    """

    name: str
    costs: str
    node_nbytes: int | None
    device_rank_nbytes: int | None
    fits: bool
    refused: str | None = None


def with_forms(model: Model, layout: Layout) -> Model:
    """Return the model with its state kept as the policy says.

    Raises:
        PartitionError: It cannot be kept so.
    """
    rules = FormRules(layout.policy.optim_bits, layout.policy.master_weights)
    device = HOST if layout.placement == "cpu" else "cuda"
    forms = [  # embeddings as NAdam(model) has them
        rules.form(spec, 32 if spec.name in model.embeddings else rules.optim_bits, device)
        for spec in model.specs
    ]
    specs = [replace(spec, form=form) for spec, form in zip(model.specs, forms, strict=True)]
    return replace(model, specs=tuple(specs))


def require_combination(model: Model, layout: Layout, num_nodes: int | None = None) -> None:
    """Refuse what the optimizer would refuse, by the same sentence.

    Args:
        model: The parameters, of a framework that reports gradients unless another one is known.
        layout: The job.
        num_nodes: Nodes; None takes those of the job.

    Raises:
        HyperparamsError: The optimizer cannot be had.
    """
    job = Job(
        num_nodes or layout.num_nodes,
        on_device=layout.placement != "cpu",
        shows_averages=model.shows_averages,
        reports_grads=model.has_hooks,
        reports_forward=model.has_hooks,
    )
    dtypes = [spec.dtype for spec in model.specs]
    norm = 1.0 if layout.clips else None
    if (refused := why_not(layout.policy, job, dtypes, max_grad_norm=norm)) is not None:
        raise refused


def plan_settings(model: Model, layout: Layout, limits: Limits) -> list[Setting]:
    """Compute the memory of a job as it is planned, and with each setting that takes less of it.

    The last two are all of them that the optimizer takes together, and twice the nodes.

    Args:
        model: The parameters.
        layout: The job.
        limits: The memory that there is.
    """
    planned = _try(AS_PLANNED, "", model, layout, limits)
    found, together = [planned], layout
    for settings, costs in CANDIDATES:
        changes = {k: v for k, v in settings.items() if getattr(layout.policy, k) != v}
        if not changes or ("offload" in changes and layout.placement == "cpu"):
            continue
        each = _try(written(changes), costs, model, layout, limits, changes)
        if each.refused is None and not _takes_less(each, planned):
            continue
        found.append(each)
        with_others = _try("", "", model, together, limits, changes)
        if each.refused is None and with_others.refused is None:
            together = _with(together, changes)
    if sum(each.refused is None for each in found) > 2:
        found.append(_try(TOGETHER, "all of that", model, together, limits))
    twice = replace(layout, num_nodes=2 * layout.num_nodes)
    return [*found, _try(f"{twice.num_nodes} nodes", "nodes", model, twice, limits)]


def remedies(settings: Sequence[Setting]) -> list[Setting]:
    """Return the single settings that make a job fit, the cheapest first, and more nodes last."""
    return [each for each in settings if each.fits and each.name not in (AS_PLANNED, TOGETHER)]


def _try(
    name: str,
    costs: str,
    model: Model,
    layout: Layout,
    limits: Limits,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Setting:
    """Compute the memory of a job with other settings, or why the optimizer refuses them."""
    try:
        layout = _with(layout, changes)
        model = with_forms(model, layout)
        require_combination(model, layout)
    except (HyperparamsError, PartitionError) as error:
        return Setting(name, costs, None, None, fits=False, refused=str(error))
    memory = memory_of(lay_out(model.specs, layout), layout, model)
    sizes = memory.node_nbytes, memory.device_rank_nbytes
    return Setting(name, costs, *sizes, fits=limits.fit(memory))


def _with(layout: Layout, changes: Mapping[str, Any]) -> Layout:
    """Return a job with other settings.

    Raises:
        HyperparamsError: They cannot be had together.
    """
    placement = "offload" if "offload" in changes else layout.placement
    return replace(layout, policy=replace(layout.policy, **changes), placement=placement)


def written(settings: Mapping[str, Any]) -> str:
    """Return settings as they are written in a call of ``ShardPolicy``."""
    text = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return text.replace("'", '"')


def _takes_less(each: Setting, planned: Setting) -> bool:
    pairs = (
        (each.node_nbytes, planned.node_nbytes),
        (each.device_rank_nbytes, planned.device_rank_nbytes),
    )
    return any((new or 0) < (old or 0) for new, old in pairs)
