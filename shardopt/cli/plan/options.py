"""The words of ``shardopt plan``, read and checked."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from shardopt.cli.plan.settings import require_combination, with_forms
from shardopt.errors import HyperparamsError, PartitionError, PlanError
from shardopt.layout.dtypes import DTYPES
from shardopt.planner.estimate import Layout
from shardopt.planner.machine import Machine, find_gpu, make_machine, read_calibration
from shardopt.planner.model import Model, evenly, load_model, read_safetensors
from shardopt.planner.simulate import NodeKind
from shardopt.planner.units import parse_count, parse_nbytes, parse_rate, parse_seconds
from shardopt.policy import ShardPolicy

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
        memory_nbytes: What a node has, or None if that is not given.
    """

    model: Model
    layout: Layout
    machine: Machine
    node_mtbf_s: float | None
    with_scaling: bool
    memory_nbytes: int | None = None


def read_request(options: argparse.Namespace) -> Request:
    """Turn options into a request.

    Raises:
        PlanError: One of them is out of range, or one is missing.
        OSError: A file cannot be read.
    """
    layout, with_scaling = _read_layout(options), options.scaling or options.plot is not None
    try:
        model = with_forms(_find_model(options), layout)
        require_combination(model, layout)
        if with_scaling:
            require_combination(model, layout, max(2, layout.num_nodes))
    except (HyperparamsError, PartitionError) as error:
        raise PlanError(str(error)) from None
    _require_few_buckets(model, layout)
    return Request(
        model=model,
        layout=layout,
        machine=_read_machine(options, layout.num_nodes),
        node_mtbf_s=_optional(parse_seconds, "--node-mtbf", options.node_mtbf),
        with_scaling=with_scaling,
        memory_nbytes=_optional(parse_nbytes, "--node-memory", options.node_memory),
    )


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


def _optional(parse: Callable[[str, str], _T], name: str, word: str | None) -> _T | None:
    """Parse a word, if there is one."""
    return None if word is None else parse(name, word)


def _read_policy(options: argparse.Namespace) -> ShardPolicy:
    """Return the policy; what it refuses itself is refused by its own sentence."""
    try:
        return ShardPolicy(
            bucket_nbytes=_optional(parse_nbytes, "--bucket", options.bucket),
            wire_dtype=options.wire_dtype,
            master_weights=False if options.no_master_weights else None,
            optim_bits=options.optim_bits,
            overlap=not options.no_overlap,
            prefetch_params=options.prefetch_params,
            check_finite=options.check_finite or None,
            offload="cpu" if options.offload else None,
            stage=options.stage,
            update_in_backward=options.update_in_backward,
            ring_nbytes=_optional(parse_nbytes, "--ring", options.ring),
            accumulate=options.accumulate,
        )
    except HyperparamsError as error:
        raise PlanError(str(error)) from None


def _read_layout(options: argparse.Namespace) -> Layout:
    if options.offload and options.gpu is None:
        raise PlanError("--offload must come with --gpu; got none. Name the GPU of each rank.")
    if options.node_memory is not None and options.gpu is not None and not options.offload:
        raise PlanError(
            f"--node-memory must come without --gpu, or with --offload; got {options.node_memory}. "
            "Leave it out: GPUs hold what training takes."
        )
    if options.forward is not None and not options.prefetch_params:
        raise PlanError(
            f"--forward must come with --prefetch-params; got {options.forward}. Leave it out: "
            "nothing else is hidden behind a forward."
        )
    slow_share, slowdown = _read_slow_nodes(options.slow_nodes)
    num_nodes = parse_count("--nodes", options.nodes)
    return Layout(
        num_nodes=num_nodes,
        node_size=_read_node_size(options, num_nodes),
        policy=_read_policy(options),
        placement="cpu" if options.gpu is None else "offload" if options.offload else "cuda",
        clips=options.clip,
        backward_s=_optional(parse_seconds, "--backward", options.backward) or 0.0,
        forward_s=_optional(parse_seconds, "--forward", options.forward) or 0.0,
        slow_share=slow_share,
        slowdown=slowdown,
        stragglers=_read_stragglers(options),
    )


def _read_node_size(options: argparse.Namespace, num_nodes: int) -> int:
    if options.ranks is None:
        return parse_count("--ranks-per-node", options.ranks_per_node)
    num_ranks = parse_count("--ranks", options.ranks)
    if num_ranks % num_nodes:
        raise PlanError(
            f"--ranks must be a multiple of --nodes; got {num_ranks} ranks on {num_nodes} nodes. "
            "Nodes of unequal size share no memory: every rank is a node then."
        )
    return num_ranks // num_nodes


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
