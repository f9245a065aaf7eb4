"""A plan as text: tables by rich if it is installed, else plain ones."""

import textwrap
from collections.abc import Iterator

from shardopt.cli import text
from shardopt.cli.plan.contents import LABELS, Plan
from shardopt.cli.plan.settings import TOGETHER, remedies
from shardopt.planner.estimate import BAND, MEASURED_NODES
from shardopt.planner.scaling import GOOD_SHARE, Scaling

_Rows = text.Rows
_SPEEDS = {
    "memory_nbytes_per_s": "memory of a node",
    "link_nbytes_per_s": "link of a node",
    "latency_s": "latency",
    "message_s": "cost per message",
    "barrier_s": "barrier of a node",
    "disk_nbytes_per_s": "disk of a node",
}


def render(plan: Plan) -> str:
    """Return the whole report."""
    parts = [
        text.fields(_overview(plan)),
        text.titled_table(f"Memory, {LABELS['memory']}", ("kind", ">node", ">rank"), _memory(plan)),
        text.titled_table(
            f"Traffic of a step, {LABELS['traffic']}",
            ("sent to other nodes by", ">bytes", ">messages"),
            [
                ("the rank that sends most", *_traffic(plan.estimate.rank_traffic)),
                ("the node that sends most", *_traffic(plan.estimate.node_traffic)),
            ],
        ),
        text.titled_table(f"Time of a step, {plan.times_are}", ("phase", ">time"), _times(plan)),
        text.titled_table(
            f"Others, {LABELS['peers']}: the least that they take",
            ("", ">rank", ">node", ">sent by a node", ">step"),
            list(_peers(plan)),
        ),
        text.titled_table("Checkpoints, by formula", ("", ">value"), _saves(plan)),
    ]
    if plan.settings:
        parts.append(_settings(plan))
    if plan.scaling is not None:
        parts += _scaling(plan.scaling)
    return "\n\n".join([*parts, "\n".join(map(_paragraph, _remarks(plan)))])


def _overview(plan: Plan) -> list[tuple[str, str]]:
    layout, machine = plan.estimate.layout, plan.machine
    origins = machine.origins
    pairs = [
        ("model", plan.source),
        ("parameters", f"{plan.numel:,}"),
        *([("moments of 8 bits", _coded(plan))] if plan.coded_numel else []),
        (
            "job",
            f"{_count(layout.num_nodes, 'node')} of {_count(layout.node_size, 'rank')}, stage "
            f"{plan.estimate.stage}",
        ),
        ("bucket", f"{text.nbytes(layout.bucket)}, {plan.estimate.num_buckets} of them"),
    ]
    for key, name in _SPEEDS.items():
        value = getattr(machine, key)
        if value is not None:
            show = text.rate if key.endswith("_nbytes_per_s") else text.seconds
            pairs.append((name, f"{show(value)} ({origins[key]})"))
    if machine.gpu is not None:
        gpu = f"{machine.gpu.name}, {text.nbytes(machine.gpu.memory_nbytes)}"
        pairs.append(("GPU of a rank", f"{gpu} ({origins['gpu']})"))
    return pairs


def _coded(plan: Plan) -> str:
    """Return how many parameters have moments of 8 bits; those of embeddings may be too many."""
    if plan.coded_numel < plan.numel:
        return f"of {plan.coded_numel:,} parameters"
    return "of all; embeddings, which NAdam(model) leaves out, are known with --model"


def _memory(plan: Plan) -> _Rows:
    memory = plan.estimate.memory
    kinds = {
        "parameters": memory.params_node_nbytes,
        "gradients": memory.grads_node_nbytes,
        "ring": memory.ring_node_nbytes,
        "late gradients": memory.late_node_nbytes,
        "moments": memory.moments_node_nbytes,
        "masters": memory.masters_node_nbytes,
        "sums and staging buffers": memory.travel_node_nbytes,
        f"sum, stage {plan.estimate.stage}": memory.node_nbytes,
    }
    if plan.estimate.stage == 1:
        del kinds["ring"], kinds["late gradients"]
    if plan.estimate.layout.policy.update_in_backward:
        del kinds["gradients"]
    size = memory.node_size
    rows = [(name, text.nbytes(n), text.nbytes(n // size)) for name, n in kinds.items()]
    if plan.machine.gpu is not None:
        rows.append(("on the GPU of each rank", "", text.nbytes(memory.device_rank_nbytes)))
    return rows


def _traffic(traffic: tuple[int, int]) -> tuple[str, str]:
    return text.nbytes(traffic[0]), f"{traffic[1]:,}"


def _times(plan: Plan) -> _Rows:
    found, phases = plan.estimate, plan.estimate.phases
    rows = [
        ("reduce-scatter, alone", text.seconds(phases.reduce_scatter_s)),
        ("update, alone", text.seconds(phases.update_s)),
        ("all-gather, alone", text.seconds(phases.all_gather_s)),
        ("consensus", text.seconds(phases.consensus_s)),
        ("step: phases overlap", text.seconds(found.simulated.step_s)),
    ]
    if found.band_s is not None:
        low, high = map(text.seconds, found.band_s)
        rows.append(("band of the step", f"{low} to {high}"))
    policy = found.layout.policy
    if found.averaging_s:
        work = "updates" if policy.update_in_backward else "averaging"
        rows.append((f"{work} in backward", text.seconds(found.averaging_s)))
    if found.layout.backward_s:
        rows.append(("hidden behind backward", text.seconds(found.hidden_s)))
        left_s = found.simulated.step_s - found.hidden_s
        rows.append(("step after backward", text.seconds(left_s)))
    if policy.prefetch_params:
        rows.append(("wait in the next forward", text.seconds(found.awaited_s)))
    return rows


def _peers(plan: Plan) -> Iterator[tuple[str, ...]]:
    found = plan.estimate
    yield (
        "shardopt",
        text.nbytes(found.memory.rank_nbytes),
        text.nbytes(found.memory.node_nbytes),
        text.nbytes(found.node_traffic.nbytes),
        text.seconds(found.simulated.step_s + found.averaging_s),
    )
    for peer in plan.peers:
        sizes = (peer.rank_nbytes, peer.node_nbytes, peer.sent_nbytes)
        yield (peer.name, *map(text.nbytes, sizes), text.seconds(peer.step_s))


def _settings(plan: Plan) -> str:
    has_gpus, rows = plan.machine.gpu is not None, []
    for each in plan.settings:
        sizes = (each.node_nbytes, each.device_rank_nbytes)[: 1 + has_gpus]
        shown = ("-" if nbytes is None else text.nbytes(nbytes) for nbytes in sizes)
        word = "refused" if each.refused else "fits" if each.fits else "too much"
        rows.append((each.name, *shown, word, each.costs))
    heads = ("ShardPolicy with", ">node", *([">each GPU"] if has_gpus else ()), "", "costs")
    return text.titled_table("Bytes per node for each setting, exact", heads, rows)


def _saves(plan: Plan) -> _Rows:
    saves = plan.saves
    rows = [
        ("size", text.nbytes(saves.nbytes)),
        ("training waits", text.seconds(saves.waits_s)),
        ("durable after", text.seconds(saves.durable_s)),
    ]
    if saves.interval_s is not None and saves.job_mtbf_s and saves.lost_share is not None:
        rows += [
            ("time between failures of the job", _duration(saves.job_mtbf_s)),
            ("interval worth choosing", _duration(saves.interval_s)),
            ("time lost then", f"{saves.lost_share:.2%}"),
        ]
    return rows


def _duration(value_s: float) -> str:
    """Format a time that may be long: in minutes, hours or days from two of them on."""
    for unit, length_s in (("days", 86400), ("h", 3600), ("min", 60)):
        if value_s >= 2 * length_s:
            return f"{value_s / length_s:.1f} {unit}"
    return text.seconds(value_s)


def _scaling(scaling: Scaling) -> list[str]:
    rows = []
    for point in scaling.points:
        band = "-"
        if point.is_extrapolated:
            band = f"{text.seconds(point.low_s['lanes'])} to {text.seconds(point.high_s['lanes'])}"
        times = (point.step_s[name] for name in ("lanes", "direct", "ring"))
        memory = text.nbytes(point.node_nbytes)
        kind = "extrapolated" if point.is_extrapolated else "simulated"
        limit = text.seconds(point.limit_s)
        rows.append((str(point.num_nodes), *map(text.seconds, times), band, limit, memory, kind))
    heads = (">nodes", ">lanes", ">direct", ">ring", ">band of lanes", ">limit", ">node memory", "")
    buckets = [
        (
            str(each.num_nodes),
            text.nbytes(each.default_nbytes),
            text.seconds(each.default_s),
            text.nbytes(each.best_nbytes),
            text.seconds(each.best_s),
            text.nbytes(max(0, each.staging_nbytes)),
        )
        for each in scaling.buckets
    ]
    bucket_heads = (">nodes", ">default", ">step", ">smallest as good", ">step", ">saves a node")
    return [
        text.titled_table("Step by number of nodes, simulated", heads, rows),
        text.titled_table("Buckets, simulated", bucket_heads, buckets),
        "\n".join(f"{name} {_stop(scaling, stop)}" for name, stop in scaling.stops_at.items()),
    ]


def _stop(scaling: Scaling, stop: int) -> str:
    close = f"within {GOOD_SHARE:.0%} of the limit"
    if not stop:
        return f"exchange: never {close} (simulated)."
    more = " and may go on" if stop == scaling.points[-1].num_nodes else ", and no further"
    return f"exchange: {close} up to {stop} nodes{more} (simulated)."


def _remarks(plan: Plan) -> Iterator[str]:
    found, gpu = plan.estimate, plan.machine.gpu
    origins = plan.machine.origins
    assumed = [name for key, name in _SPEEDS.items() if origins.get(key) == "assumed"]
    yield (
        f"Bytes and messages are exact. Times are {plan.times_are}, not measured; assumed are "
        f"{', '.join(assumed) or 'no speeds'}."
    )
    if found.layout.is_extrapolated:
        yield (
            f"Beyond {MEASURED_NODES} nodes times are extrapolated; the band is latency and cost "
            f"per message x {BAND[0]:g} to {BAND[1]:g}."
        )
    slowest = max(kind.slowdown for kind in found.layout.kinds)
    if slowest > 1:
        yield f"Some nodes are drawn as slow, up to {slowest:g} times: all others wait for them."
    for kind in found.layout.stragglers:
        if kind.link_slowdown > 1:
            yield f"One node sends {kind.link_slowdown:g} times slower: all others wait for it."
        if kind.late_s:
            yield f"One rank comes {text.seconds(kind.late_s)} late: all others wait for it."
    if found.node_share > 1.02:
        yield (
            f"The last node owns {found.node_share:.1f} times the average: a bucket has too few "
            "chunks of 4096 elements for so many ranks. Raise --bucket."
        )
    if gpu is not None:
        yield "Steps on GPUs have not been measured: they cannot beat published bandwidths."
    if found.stage == 2 and found.layout.sends_in_backward:
        yield (
            "Stage 2 exchanges gradients in each backward; --backward shows how much of that it "
            "hides. Of several in a step each sends its gradients, unless --accumulate is node."
        )
    if found.layout.policy.prefetch_params and not found.layout.forward_s:
        yield "The wait in the next forward is that of one that takes no time: give --forward."
    yield from _remarks_on_memory(plan)
    if plan.saves.interval_s is not None:
        yield "The interval is Daly's (2006), from Young's (1974), of the time that training waits."


def _remarks_on_memory(plan: Plan) -> Iterator[str]:
    """Yield what does not fit, and the settings with which it would."""
    memory, limits = plan.estimate.memory, plan.limits
    needs = []
    if limits.gpu is not None and memory.device_rank_nbytes > limits.gpu.memory_nbytes:
        needs.append(
            ("Each GPU", memory.device_rank_nbytes, limits.gpu.name, limits.gpu.memory_nbytes)
        )
    if limits.node_nbytes is not None and memory.node_nbytes > limits.node_nbytes:
        needs.append(("Each node", memory.node_nbytes, "it", limits.node_nbytes))
    for who, need, owner, has in needs:
        yield f"{who} must hold {text.nbytes(need)}; {owner} has {text.nbytes(has)}."
    if needs:
        names = [each.name for each in remedies(plan.settings)]
        together = next((each for each in plan.settings if each.name == TOGETHER), None)
        if names:
            yield f"It fits with one of these, the cheapest first: {'; '.join(names)}."
        elif together is not None and together.fits:
            yield "It fits with all of these settings together."
        else:
            yield "No setting makes it fit, nor do twice the nodes: take more."
    refused: dict[str, list[str]] = {}
    for each in plan.settings:
        if each.refused is not None:
            refused.setdefault(each.refused, []).append(each.name)
    for sentence, names in refused.items():
        yield f"Refused with {'; '.join(names)}: {sentence}"


def _paragraph(words: str) -> str:
    return textwrap.fill(words, text.WIDTH, break_on_hyphens=False)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
