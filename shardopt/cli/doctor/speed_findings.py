"""Judgements about the speeds of a job's parts: pure functions from facts to findings."""

from shardopt.cli import text
from shardopt.cli.doctor.facts import Job, Link, Speeds
from shardopt.cli.doctor.finding import Finding, Level

_MODEL_NUMEL = 100_000_000  # parameters of the model that a step is estimated for
_ITEMSIZE = 4  # float32
_UPDATE_NBYTES = 24  # per parameter: exp_avg, exp_avg_sq and the parameter, read and written

_SLOW_NODE = _SLOW_LINK = 0.5  # of the fastest
_CROWDED_SWITCH = 0.6  # of the slowest link
_SLOW_BARRIER_S = 1e-3
_SLOW_LATENCY_S = 1e-3
_DEAR_MESSAGE_S = 200e-6
_ETHERNET_NBYTES_PER_S = 0.2e9  # a network made for MPI is faster

_INTERFACE = "OMPI_MCA_btl_tcp_if_include=INTERFACE (Open MPI), HYDRA_IFACE=INTERFACE (MPICH)"


def judge_speeds(job: Job, speeds: Speeds) -> list[Finding]:
    """Judge the measurements of a job."""
    findings = [_judge_memory(job, speeds), _judge_barrier(job, speeds)]
    if speeds.links:
        findings += [
            _judge_latency(job, speeds),
            _judge_links(job, speeds),
            _judge_exchange(job, speeds),
            _judge_messages(job, speeds),
        ]
    else:
        told = "there is one node, so a step uses no network."
        findings.append(Finding(Level.OK, "network", told))
    return [*findings, *_judge_disk(job, speeds), _estimate_step(job, speeds)]


def _judge_memory(job: Job, speeds: Speeds) -> Finding:
    slow, fast = min(speeds.memory), max(speeds.memory)
    host = job.nodes[speeds.memory.index(slow)].host
    if slow < _SLOW_NODE * fast:
        return Finding(
            Level.NOTE,
            "memory",
            f"nodes should be equally fast; got {text.rate(slow)} on {host} and {text.rate(fast)} "
            f"on {job.nodes[speeds.memory.index(fast)].host}. Every step waits for the slowest: "
            "check what else runs there.",
        )
    told = f"{text.rate(slow)} on {host}, all ranks at once: the limit of an update."
    return Finding(Level.OK, "memory", told)


def _judge_barrier(job: Job, speeds: Speeds) -> Finding:
    times = [barrier_s or 0.0 for barrier_s in speeds.barrier_s]
    longest = max(times)
    host = job.nodes[times.index(longest)].host
    if longest > _SLOW_BARRIER_S:
        return Finding(
            Level.NOTE,
            "barrier",
            f"a barrier within a node should take less than {text.seconds(_SLOW_BARRIER_S)}; got "
            f"{text.seconds(longest)} on {host}, and a step has several. Start fewer ranks than "
            "there are cores, or set OMPI_MCA_mpi_yield_when_idle=1 (Open MPI).",
        )
    if not longest:
        return Finding(Level.OK, "barrier", "a single rank per node never waits within its node.")
    told = f"{text.seconds(longest)} within {host}: the least time of a very small model's step."
    return Finding(Level.OK, "barrier", told)


def _judge_latency(job: Job, speeds: Speeds) -> Finding:
    worst = max(speeds.links, key=lambda link: link.latency_s)
    shown = f"{text.seconds(worst.latency_s)} between {_name(job, worst)}"
    if worst.latency_s > _SLOW_LATENCY_S:
        told = (
            f"a message should take less than {text.seconds(_SLOW_LATENCY_S)}; got {shown}. Make "
            f"sure that MPI uses the fast network: {_INTERFACE}."
        )
        return Finding(Level.NOTE, "latency", told)
    told = f"{shown}, the longest: the least time of any exchange between nodes."
    return Finding(Level.OK, "latency", told)


def _judge_links(job: Job, speeds: Speeds) -> Finding:
    slow, fast = (choose(speeds.links, key=lambda link: link.nbytes_per_s) for choose in (min, max))
    shown = f"{text.rate(slow.nbytes_per_s)} each way between {_name(job, slow)}"
    if slow.nbytes_per_s < _SLOW_LINK * fast.nbytes_per_s:
        told = (
            f"links should be equally fast; got {shown}, the slowest, and "
            f"{text.rate(fast.nbytes_per_s)} between {_name(job, fast)}, the fastest. Every step "
            "waits for the slowest: check its cable, port and settings, or leave its nodes out."
        )
        return Finding(Level.PROBLEM, "links", told)
    if slow.nbytes_per_s < _ETHERNET_NBYTES_PER_S:
        told = (
            f"links should be faster than plain Ethernet; got {shown}, the slowest. If there is a "
            f"faster network, choose it: {_INTERFACE}."
        )
        return Finding(Level.NOTE, "links", told)
    if len(speeds.links) == 1:
        return Finding(Level.OK, "links", f"{shown}.")
    told = (
        f"{shown}, the slowest, and {text.rate(fast.nbytes_per_s)} between {_name(job, fast)}, the "
        "fastest: similar."
    )
    return Finding(Level.OK, "links", told)


def _judge_exchange(job: Job, speeds: Speeds) -> Finding:
    slow = min(speeds.exchange)
    alone = min(link.nbytes_per_s for link in speeds.links)
    host = job.nodes[speeds.exchange.index(slow)].host
    shown = f"{text.rate(slow)} from {host} while all nodes send to all"
    if slow < _CROWDED_SWITCH * alone:
        told = (
            f"nodes should not slow each other down; got {shown}, but {text.rate(alone)} when one "
            "pair sends alone. The switch between them is too small, or shared with other jobs: "
            "ask for nodes on one switch."
        )
        return Finding(Level.NOTE, "all links", told)
    return Finding(Level.OK, "all links", f"{shown}: the nodes do not slow each other down.")


def _judge_messages(job: Job, speeds: Speeds) -> Finding:
    longest = max(speeds.message_s)
    host = job.nodes[speeds.message_s.index(longest)].host
    if longest > _DEAR_MESSAGE_S:
        told = (
            f"a message should cost a rank less than {text.seconds(_DEAR_MESSAGE_S)}; got "
            f"{text.seconds(longest)} on {host}, beside the time of its bytes. Start fewer ranks "
            "than there are cores, or raise policy.bucket_nbytes, so that messages are fewer."
        )
        return Finding(Level.NOTE, "messages", told)
    told = f"{text.seconds(longest)} of a rank's time for each on {host}, beside that of its bytes."
    return Finding(Level.OK, "messages", told)


def _judge_disk(job: Job, speeds: Speeds) -> list[Finding]:
    if speeds.disk_problem is not None:
        told = (
            f"the folder must be one that all ranks can write to; got {speeds.disk_problem}. "
            "Choose another: --folder FOLDER."
        )
        return [Finding(Level.NOTE, "disk", told)]
    if not speeds.disk:
        return []
    slow = min(speeds.disk)
    host = job.nodes[speeds.disk.index(slow)].host
    told = f"{text.rate(slow)} from {host}, all ranks at once: the limit of a checkpoint."
    return [Finding(Level.OK, "disk", told)]


def _estimate_step(job: Job, speeds: Speeds) -> Finding:
    size = f"{text.number(_MODEL_NUMEL)} float32 parameters"
    if not job.is_even:
        told = f"the time for {size} is not estimated because nodes differ in number of ranks."
        return Finding(Level.OK, "step", told)
    update_s = update_seconds(job, speeds, _MODEL_NUMEL)
    if len(job.nodes) == 1:
        told = f"an update of {size} takes at least {text.seconds(update_s)} of memory traffic."
        return Finding(Level.OK, "step", told)
    network_s = network_seconds(speeds, _MODEL_NUMEL)
    bound = "the network" if network_s > update_s else "memory"
    more = " Accumulate gradients over several batches to take fewer steps."
    told = (
        f"{size} take at least {text.seconds(network_s)} between the nodes and "
        f"{text.seconds(update_s)} of memory traffic: {bound} limits a step."
        f"{more if network_s > update_s else ''}"
    )
    return Finding(Level.OK, "step", told)


def update_seconds(job: Job, speeds: Speeds, numel: int) -> float:
    """Estimate an update: a node reads all gradients, and reads and writes its part of the rest.

    Returns:
        Seconds.
    """
    num_nodes, node_size = len(job.nodes), len(job.nodes[0].ranks)
    nbytes = (_ITEMSIZE * node_size + _UPDATE_NBYTES / num_nodes) * numel
    return nbytes / min(speeds.memory)


def network_seconds(speeds: Speeds, numel: int) -> float:
    """Estimate the traffic between nodes: gradients to their owners, parameters back to all.

    Returns:
        Seconds.
    """
    num_nodes = len(speeds.exchange)
    return 2 * _ITEMSIZE * numel * (num_nodes - 1) / num_nodes / min(speeds.exchange)


def _name(job: Job, link: Link) -> str:
    return " and ".join(job.nodes[node].host for node in link.nodes)
