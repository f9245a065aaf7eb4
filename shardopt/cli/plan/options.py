"""The words of ``shardopt plan``, read and checked."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from shardopt.backends.devices import HOST
from shardopt.errors import PartitionError, PlanError
from shardopt.layout.dtypes import DTYPES, has_master
from shardopt.params.forms import FormRules
from shardopt.planner.estimate import Layout
from shardopt.planner.machine import Machine, find_gpu, make_machine, read_calibration
from shardopt.planner.model import Model, evenly, load_model, read_safetensors
from shardopt.planner.simulate import NodeKind
from shardopt.planner.units import parse_count, parse_nbytes, parse_rate, parse_seconds

_MAX_TENSORS, _MAX_BUCKETS = 1_000_000, 1_000_000
_T = TypeVar("_T")
_RATES = {"memory_bandwidth": "memory_nbytes_per_s", "link": "link_nbytes_per_s"}
_RATES |= {"disk": "disk_nbytes_per_s"}
_TIMES = {"latency": "latency_s", "message_cost": "message_s"}


@dataclass(frozen=True, slots=True)
class Request:
    """The job to plan.

    Attributes:
        model: The parameters.
        layout: The job.
        machine: Its speeds.
        node_mtbf_s: Mean time between failures of a node in seconds, or None.
        with_scaling: Whether to simulate other numbers of nodes.
    """

    model: Model
    layout: Layout
    machine: Machine
    node_mtbf_s: float | None
    with_scaling: bool


def read_request(options: argparse.Namespace) -> Request:
    """Turn options into a request.

    Raises:
        PlanError: One of them is out of range, or one is missing.
        OSError: A file cannot be read.
    """
    layout = _read_layout(options)
    try:
        model = _read_model(options)
    except PartitionError as error:
        raise PlanError(str(error)) from None
    _require_few_buckets(model, layout)
    _require_stage(options, model)
    return Request(
        model=model,
        layout=layout,
        machine=_read_machine(options, layout.num_nodes),
        node_mtbf_s=_optional(parse_seconds, "--node-mtbf", options.node_mtbf),
        with_scaling=options.scaling or options.plot is not None,
    )


def _read_model(options: argparse.Namespace) -> Model:
    """Return the model, with its state kept as the options say."""
    model = _find_model(options)
    rules = FormRules(options.optim_bits, False if options.no_master_weights else None)
    device = HOST if options.gpu is None else options.gpu
    forms = [  # embeddings as NAdam(model) has them
        rules.form(spec, 32 if spec.name in model.embeddings else rules.optim_bits, device)
        for spec in model.specs
    ]
    specs = [replace(spec, form=form) for spec, form in zip(model.specs, forms, strict=True)]
    return replace(model, specs=tuple(specs))


def _find_model(options: argparse.Namespace) -> Model:
    if options.model is not None:
        return load_model(options.model)
    if options.safetensors is not None:
        return read_safetensors(options.safetensors)
    num_tensors = parse_count("--tensors", options.tensors)
    if num_tensors > _MAX_TENSORS:
        raise PlanError(
            f"--tensors must be at most {_MAX_TENSORS:,}; got {num_tensors:,}. Their number makes "
            "little difference: leave it out."
        )
    if options.dtype not in DTYPES:
        raise PlanError(
            f"--dtype must be one of {', '.join(DTYPES)}; got {options.dtype!r}. Name one of them."
        )
    return evenly(parse_count("--params", options.params), options.dtype, num_tensors)


def _require_few_buckets(model: Model, layout: Layout) -> None:
    """Refuse what would take minutes and gigabytes to plan."""
    nbytes = sum(spec.numel * np.dtype(spec.dtype).itemsize for spec in model.specs)
    if nbytes > _MAX_BUCKETS * layout.bucket:
        raise PlanError(
            f"--bucket must cut the model into at most {_MAX_BUCKETS:,} buckets; got "
            f"{layout.bucket:,} bytes for {nbytes:,}. Raise it, or plan for a smaller model."
        )


def _require_stage(options: argparse.Namespace, model: Model) -> None:
    """Refuse what no plan of stage 2 knows."""
    if options.stage == 1:
        if options.ring is not None:
            raise PlanError("--ring must come with --stage 2; got stage 1. Leave it out.")
        return
    small = next((spec.dtype for spec in model.specs if has_master(spec.dtype)), None)
    reasons = {
        f"--nodes {options.nodes}": options.nodes != "1",
        f"--gpu {options.gpu}": options.gpu is not None,
        f"parameters in {small}": small is not None,
        "--scaling": options.scaling or options.plot is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise PlanError(
                f"--stage must be 1 with {reason}; got 2. Leave it out: plans know stage 2 on one "
                "node of CPUs, in 32 or 64 bits."
            )


def _optional(parse: Callable[[str, str], _T], name: str, word: str | None) -> _T | None:
    """Parse a word, if there is one."""
    return None if word is None else parse(name, word)


def _read_layout(options: argparse.Namespace) -> Layout:
    if options.offload and options.gpu is None:
        raise PlanError("--offload must come with --gpu; got none. Name the GPU of each rank.")
    slow_share, slowdown = _read_slow_nodes(options.slow_nodes)
    return Layout(
        num_nodes=parse_count("--nodes", options.nodes),
        node_size=parse_count("--ranks-per-node", options.ranks_per_node),
        bucket_nbytes=_optional(parse_nbytes, "--bucket", options.bucket),
        wire_dtype=options.wire_dtype,
        placement="cpu" if options.gpu is None else "offload" if options.offload else "cuda",
        needs_norm=options.clip,
        backward_s=_optional(parse_seconds, "--backward", options.backward) or 0.0,
        slow_share=slow_share,
        slowdown=slowdown,
        stragglers=_read_stragglers(options),
        stage=options.stage,
        ring_nbytes=_optional(parse_nbytes, "--ring", options.ring),
    )


def _read_stragglers(options: argparse.Namespace) -> tuple[NodeKind, ...]:
    """Return a node with a slow link and one with a late rank, if they are asked for."""
    found = []
    if (word := options.slow_link) is not None:
        try:
            factor = float(word)
        except ValueError:
            factor = 0.0
        if not 1 <= factor < 1000:
            raise PlanError(
                f"--slow-link must be a factor >= 1; got {word!r}. Write 2 for a node that sends "
                "at half the rate of others."
            )
        found.append(NodeKind(link_slowdown=factor))
    if options.late_rank is not None:
        found.append(NodeKind(late_s=parse_seconds("--late-rank", options.late_rank)))
    return tuple(found)


def _read_slow_nodes(word: str | None) -> tuple[float, float]:
    """Return the share of slow nodes, and the factor that they are slower by."""
    if word is None:
        return 0.0, 1.0
    try:
        share, factor = map(float, word.split(":"))
    except ValueError:
        share = factor = 0.0
    if not (0 < share <= 1 <= factor < 1000):
        raise PlanError(
            f"--slow-nodes must be a share <= 1 and a factor >= 1; got {word!r}. Write 0.01:2 for "
            "a hundredth of the nodes that is up to twice as slow."
        )
    return share, factor


def _read_machine(options: argparse.Namespace, num_nodes: int) -> Machine:
    given = {}
    for names, parse in ((_RATES, parse_rate), (_TIMES, parse_seconds)):
        for option, name in names.items():
            if (word := getattr(options, option)) is not None:
                given[name] = parse(f"--{option.replace('_', '-')}", word)
    calibration = read_calibration(options.calibration) if options.calibration else {}
    gpu = find_gpu(options.gpu) if options.gpu is not None else None
    return make_machine(given, calibration, gpu, num_nodes)
