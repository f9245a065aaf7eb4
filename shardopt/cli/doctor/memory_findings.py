"""Judgements about the memory of nodes: pure functions from facts to findings."""

from shardopt.cli import text
from shardopt.cli.doctor.facts import Job, Node
from shardopt.cli.doctor.finding import Finding, Level
from shardopt.comm.node_memory.mpi_shm import MPI_SHM_FOLDER, OPENMPI_RESERVED_NBYTES

_ITEMSIZE = 4  # float32
_MOMENTS_NBYTES = 8  # per parameter
_TIGHT = 0.5  # of the parameters that memory has room for


def judge_memory(job: Job) -> list[Finding]:
    """Judge whether the ranks of each node can share memory, how much of it, and at what speed."""
    findings = [_judge_sharing(job), _judge_room(job), _judge_mpi_shm(job), _judge_tracking(job)]
    return [*findings, _judge_slurm(job)] if job.slurm else findings


def _judge_sharing(job: Job) -> Finding:
    topic = "shared memory"
    for node in job.nodes:
        if node.sharing_problem:
            return Finding(
                Level.PROBLEM,
                topic,
                f"ranks of {node.host} must be able to share memory; {node.sharing_problem}. Start "
                "them in one container, or pass ShardPolicy(share_node=False).",
            )
    told = "ranks of a node can share memory, and see each other's stores."
    return Finding(Level.OK, topic, told)


def room_for(job: Job, node: Node) -> int:
    """Return the number of float32 parameters that the memory of a node has room for."""
    return int(node.free_nbytes / _node_nbytes(job, node))


def _node_nbytes(job: Job, node: Node) -> float:
    """Return the bytes that a node's memory takes for each parameter.

    Parameters once, the gradients of every rank and a part of the moments. If nodes are uneven,
    each rank has parameters of its own.
    """
    if job.is_even:
        return _ITEMSIZE * (1 + len(node.ranks)) + _MOMENTS_NBYTES / len(job.nodes)
    return len(node.ranks) * (2 * _ITEMSIZE + _MOMENTS_NBYTES / job.world_size)


def _judge_room(job: Job) -> Finding:
    topic = "free memory"
    node = min(job.nodes, key=lambda node: room_for(job, node))
    room = room_for(job, node)
    shown = f"{text.number(room)} float32 parameters"
    for node_ in job.nodes:
        finding = _judge_process_limits(job, node_, topic)
        if finding:
            return finding
    free = f"{text.nbytes(node.free_nbytes)} free on {node.host}"
    below = f", below {node.memory_limit}" if node.memory_limit else ""
    return Finding(Level.OK, topic, f"{free}{below}: enough for models of up to {shown}.")


def _judge_process_limits(job: Job, node: Node, topic: str) -> Finding | None:
    """Judge limits that count more than the memory in use; None if they hardly matter."""
    room, size = room_for(job, node), len(node.ranks)
    node_nbytes = _node_nbytes(job, node)
    rank_nbytes = node_nbytes if job.is_even else node_nbytes / size
    mapped = int((node.address_nbytes or 0) / (rank_nbytes + _ITEMSIZE))
    if node.address_nbytes is not None and mapped < _TIGHT * room:
        return Finding(
            Level.PROBLEM,
            topic,
            f"the address space of a rank should be as large as memory; got {_free(node)} but "
            f"{text.nbytes(node.address_nbytes)} of addresses (ulimit -v): enough for "
            f"{text.number(mapped)} instead of {text.number(room)} float32 parameters. Lift the "
            "limit before the job starts (ulimit -v unlimited).",
        )
    promised = int((node.promise_nbytes or 0) / (node_nbytes + _ITEMSIZE * size))
    if node.promise_nbytes is not None and promised < _TIGHT * room:
        return Finding(
            Level.PROBLEM,
            topic,
            f"the system should promise as much memory as it has; got {_free(node)} but "
            f"{text.nbytes(node.promise_nbytes)} below its CommitLimit, and with "
            "vm.overcommit_memory=2 every rank's view of the weights counts in full: enough for "
            f"{text.number(promised)} instead of {text.number(room)} float32 parameters. Set "
            "vm.overcommit_memory=0 (sysctl -w), or raise vm.overcommit_ratio.",
        )
    return None


def _free(node: Node) -> str:
    return f"{text.nbytes(node.free_nbytes)} free on {node.host}"


def _judge_mpi_shm(job: Job) -> Finding:
    topic = MPI_SHM_FOLDER
    node = max(job.nodes, key=lambda node: node.mpi_shm_nbytes / max(1, node.shm_nbytes))
    size, needed = node.shm_nbytes, node.mpi_shm_nbytes
    if job.library.family == "Open MPI" and size < max(needed, OPENMPI_RESERVED_NBYTES):
        few = "sends messages within a node through the network stack, which takes longer"
        many = "may fill it with messages and die by a bus error"
        return Finding(
            Level.NOTE,
            topic,
            f"{topic} should have {text.nbytes(max(needed, OPENMPI_RESERVED_NBYTES))} for Open "
            f"MPI's messages; got {text.nbytes(size)} on {node.host}, where it "
            f"{few if size < OPENMPI_RESERVED_NBYTES else many}. Enlarge it (docker run "
            "--shm-size=...), or set OMPI_MCA_btl_sm_backing_directory=/tmp.",
        )
    if not needed:
        told = f"shardopt puts nothing there; {job.library.name} may need a little."
        return Finding(Level.OK, topic, told)
    told = (
        f"{job.library.name} takes up to {text.nbytes(needed)} of {text.nbytes(size)} on "
        f"{node.host}; shardopt puts nothing there."
    )
    return Finding(Level.OK, topic, told)


def _judge_tracking(job: Job) -> Finding:
    topic = "write tracking"
    for node in job.nodes:
        if node.tracking is None:
            told = f"on {node.host}, {node.tracking_reason}"
            return Finding(Level.PROBLEM, topic, told)
    slowest = ("compare", "pagemap", "userfaultfd")
    node = min(job.nodes, key=lambda node: slowest.index(node.tracking or ""))
    costs = {
        "pagemap": "the pagemap, which takes 20 ms per GiB of weights in each step",
        "compare": "a comparison of all weights in each step, after which every rank maps them "
        "anew: the slowest way",
    }
    if node.tracking in costs:
        return Finding(
            Level.NOTE,
            topic,
            "weights that your program has written should be found by userfaultfd; got "
            f"{costs[node.tracking]}, on {node.host}. {node.tracking_reason} Results are the same.",
        )
    told = "userfaultfd finds the weights that your program has written, in 1 to 4 ms per GiB."
    return Finding(Level.OK, topic, told)


def _judge_slurm(job: Job) -> Finding:
    topic, slurm = "Slurm", job.slurm
    assert slurm is not None
    params = slurm.gather_params.split(",")
    if slurm.gather_type != "jobacct_gather/linux" or {"UsePss", "NoShared"} & set(params):
        told = f"{slurm.gather_type} with {slurm.gather_params or 'no parameters'} counts "
        return Finding(Level.OK, topic, f"{told}shared memory at most once.")
    kills = "OverMemoryKill" in params
    effect = "kills jobs by the sum" if kills else "reports the sum as the job's memory (sacct)"
    return Finding(
        Level.PROBLEM if kills else Level.NOTE,
        topic,
        "Slurm should count shared memory once; got JobAcctGatherParams="
        f"{slurm.gather_params or '(null)'} without UsePss: it counts the node's memory once for "
        f"each rank, and {effect}. Ask the administrator for JobAcctGatherParams=UsePss, or for "
        "JobAcctGatherType=jobacct_gather/cgroup.",
    )
