"""Judgements about the GPUs of a job: pure functions from facts to findings."""

from collections.abc import Iterator
from typing import NamedTuple

from shardopt.backends.cuda.peers import Device
from shardopt.cli import text
from shardopt.cli.doctor.facts import Job, Node, Rank, RankGpu
from shardopt.cli.doctor.finding import Finding, Level

_LITTLE_PINNED_NBYTES = 1 << 30
_ONE_EACH = (
    "Start as many ranks on a node as it has GPUs (--gpus-per-node of the scripts in launch/)"
)


class _Place(NamedTuple):
    """A rank with its GPU."""

    node: Node
    rank: Rank
    gpu: RankGpu
    device: Device


def judge_gpus(job: Job) -> list[Finding]:
    """Judge the GPUs; where there are none, that is all there is to say."""
    if not any(node.num_gpus for node in job.nodes):
        return [Finding(Level.OK, "GPUs", "none; shardopt needs none.")]
    findings = [_judge_software(job)]
    if findings[0].level is Level.OK:
        findings += [
            _judge_devices(job),
            _judge_peers(job),
            _judge_pinned_memory(job),
            _describe_messages(job),
        ]
    slurm = _judge_slurm(job)
    return [*findings, slurm] if slurm else findings


def _judge_software(job: Job) -> Finding:
    topic = "GPUs"
    found = [node for node in job.nodes if node.num_gpus]
    if len(found) < len(job.nodes):
        without = next(node for node in job.nodes if not node.num_gpus)
        return Finding(
            Level.NOTE,
            topic,
            f"all nodes should have GPUs, or none; got {found[0].num_gpus} on {found[0].host} and "
            f"none on {without.host}. All ranks must train on GPUs, or all on CPUs.",
        )
    for rank in job.ranks:
        problem = rank.gpu.software.problem if rank.gpu else "They have not been examined."
        if problem:
            node = job.nodes[rank.node]
            return Finding(
                Level.NOTE,
                topic,
                f"every rank should be able to use its node's GPUs; got {node.num_gpus} on "
                f"{node.host}, but not for rank {rank.rank}. {problem} Parameters in the CPU's "
                "memory need no GPU.",
            )
    places = list(_places(job))
    software = places[0].gpu.software
    kinds = {f"{place.device.name} of {text.nbytes(place.device.nbytes)}" for place in places}
    num_gpus = sum(node.num_gpus for node in job.nodes)
    told = (
        f"{num_gpus} on {len(job.nodes)} node{'s' * (len(job.nodes) > 1)}, "
        f"{text.some(sorted(kinds))}; driver {software.driver or 'of unknown version'} for CUDA up "
        f"to {software.cuda}, CuPy {software.cupy}."
    )
    return Finding(Level.OK, topic, told)


def _judge_devices(job: Job) -> Finding:
    topic = "GPU of a rank"
    taken: dict[tuple[str, str], list[_Place]] = {}
    for place in _places(job):
        taken.setdefault((place.node.host, place.device.uuid), []).append(place)
    for (host, _), places in taken.items():
        if len(places) > 1:
            ranks = text.ranges(place.rank.rank for place in places)
            return Finding(
                Level.NOTE,
                topic,
                f"each rank should have a GPU of its own; got ranks {ranks} on "
                f"{_name(places[0].device)} of {host}, where they take turns. {_ONE_EACH}, and "
                f"check CUDA_VISIBLE_DEVICES, which is {_visible(places[0].rank)}.",
            )
    for node in job.nodes:
        used = {place.device.bus_id for place in _places(job) if place.node is node}
        if len(used) < node.num_gpus:
            return Finding(
                Level.NOTE,
                topic,
                f"each GPU should have a rank; got ranks on {len(used)} of {node.num_gpus} GPUs "
                f"of {node.host}. {_ONE_EACH}.",
            )
    shown = [f"rank {place.rank.rank}: {_name(place.device)}" for place in _places(job)]
    told = (
        f"local rank modulo the GPUs that it sees. {text.some(shown)}. CUDA_VISIBLE_DEVICES of "
        f"rank 0 is {_visible(job.ranks[0])}."
    )
    return Finding(Level.OK, topic, told)


def _judge_peers(job: Job) -> Finding:
    topic = "peer access"
    for node in job.nodes:
        if node.peers and not node.peers.is_direct:
            return Finding(
                Level.NOTE,
                topic,
                f"ranks of {node.host} should reach each other's GPUs; got a failed test, so that "
                "what they exchange is staged: it passes through pinned memory, which is slower. "
                f"{node.peers.reason}",
            )
    if all(len(node.ranks) == 1 for node in job.nodes):
        return Finding(Level.OK, topic, "a single rank per node reads its own GPU only.")
    told = "direct: each rank reads and writes the memory of its node's other GPUs."
    return Finding(Level.OK, topic, told)


def _judge_pinned_memory(job: Job) -> Finding:
    topic = "pinned memory"
    limits = [(place.gpu.pinned_nbytes, place.node.host) for place in _places(job)]
    limit, host = min(
        ((nbytes, host) for nbytes, host in limits if nbytes is not None), default=(None, "")
    )
    if limit is None:
        return Finding(Level.OK, topic, "no limit (ulimit -l).")
    if limit >= _LITTLE_PINNED_NBYTES:
        return Finding(Level.OK, topic, f"up to {text.nbytes(limit)} on {host} (ulimit -l).")
    return Finding(
        Level.NOTE,
        topic,
        f"the limit of locked memory should be lifted; got {text.nbytes(limit)} on {host} "
        "(ulimit -l). Staged copies, messages between nodes and offload may fail to pin their "
        "memory: ulimit -l unlimited, docker run --ulimit memlock=-1, or PropagateResourceLimits "
        "of Slurm.",
    )


def _describe_messages(job: Job) -> Finding:
    aware = {
        True: "says that it accepts",
        False: "says that it does not accept",
        None: "does not say whether it accepts",
    }
    told = (
        "between nodes, messages are staged in pinned memory. "
        f"{job.library.name} {aware[job.library.cuda_aware]} pointers to memory of GPUs, which "
        "shardopt passes to no MPI."
    )
    return Finding(Level.OK, "GPU messages", told)


def _judge_slurm(job: Job) -> Finding | None:
    """Judge how Slurm binds tasks to GPUs, unless they reach each other all the same."""
    if all(node.peers and node.peers.is_direct for node in job.nodes):
        return None
    bound = next((r for r in job.ranks if r.gpu and r.gpu.slurm_binding), None)
    if bound is None or bound.gpu is None:
        return None
    return Finding(
        Level.NOTE,
        "Slurm and GPUs",
        f"Slurm should show each task all GPUs of its node; got {bound.gpu.slurm_binding}, which "
        "hides those of other tasks in control groups, so that ranks cannot open their memory. "
        "Ask for --gpus-per-node=N --gpu-bind=none; launch/rank_env.sh gives each rank one.",
    )


def _places(job: Job) -> Iterator[_Place]:
    for rank in job.ranks:
        if rank.gpu and rank.gpu.device:
            yield _Place(job.nodes[rank.node], rank, rank.gpu, rank.gpu.device)


def _name(device: Device) -> str:
    return f"GPU {device.number} ({device.bus_id})"


def _visible(rank: Rank) -> str:
    seen = rank.cuda_visible_devices
    return "not set" if seen is None else repr(seen)
