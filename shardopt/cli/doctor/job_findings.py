"""Judgements about how a job was started: pure functions from facts to findings."""

from shardopt.cli import text
from shardopt.cli.doctor.facts import Job, Node, starts
from shardopt.cli.doctor.finding import Finding, Level
from shardopt.cli.doctor.gpu_findings import judge_gpus
from shardopt.cli.doctor.memory_findings import judge_memory
from shardopt.comm.node_memory.mpi_shm import MPI_SHM_FOLDER


def judge_job(job: Job) -> list[Finding]:
    """Judge the job; what kept MPI from being started leaves little else to judge."""
    if not job.launcher_fits:
        return [_judge_launcher(job), _judge_environment(job)]
    if job.start_problem:
        problem = Finding(Level.PROBLEM, MPI_SHM_FOLDER, job.start_problem)
        return [_judge_launcher(job), _judge_environment(job), problem]
    return [
        _judge_launcher(job),
        _judge_environment(job),
        _judge_nodes(job),
        _judge_cores(job),
        _judge_threads(job),
        *judge_memory(job),
        _judge_thread_level(job),
        *judge_gpus(job),
    ]


def _judge_launcher(job: Job) -> Finding:
    topic, library = "launcher", f"{job.library.name} {job.library.version}".strip()
    remedy = f"Start the job with the mpirun of this library{_place(job.library.mpirun)}."
    if job.launcher and not job.launcher_fits:
        sees = "which cannot start under it"
        if starts(job.launcher, job.library):
            sees = f"which sees {job.world_size} of them: every process would train on its own"
        return Finding(
            Level.PROBLEM,
            topic,
            f"launcher and MPI library must fit together; got {job.launcher.name} with "
            f"{_count(job.launched, 'process', 'es')} and the library {library}, {sees}. {remedy}",
        )
    if job.launcher:
        told = f"{job.launcher.name} and {library} fit together."
        return Finding(Level.OK, topic, told)
    if job.mpirun is None:
        told = f"mpirun should be on the PATH; got none, so that there is one rank. {remedy}"
        return Finding(Level.NOTE, topic, told)
    if job.mpirun.family not in (None, job.library.family):
        return Finding(
            Level.PROBLEM,
            topic,
            f"mpirun on the PATH must belong to the MPI library; got {job.mpirun.path} of "
            f"{job.mpirun.family} and the library {library}. {remedy}",
        )
    told = f"no launcher, hence one rank. {job.mpirun.path} starts more."
    return Finding(Level.OK, topic, told)


def _judge_environment(job: Job) -> Finding:
    named = ", ".join(job.environment) or "no scheduler, container, conda or Spack"
    site = f"{job.library.site} is the site's MPI, and docs/installing.md has a row for it."
    parts = [f"{named}; Python is in {job.prefix}.", site if job.library.site else ""]
    return Finding(Level.OK, "environment", " ".join(filter(None, parts)))


def _place(path: str | None) -> str:
    return f", {path}" if path else ""


def _judge_nodes(job: Job) -> Finding:
    sizes = [len(node.ranks) for node in job.nodes]
    hosts = [node.host for node in job.nodes]
    shown = text.some([f"{node.host} {len(node.ranks)}" for node in job.nodes])
    apart = find_separated(job)
    if apart:
        return apart
    twice = next((host for host in hosts if hosts.count(host) > 1), None)
    if twice:
        return Finding(
            Level.PROBLEM,
            "nodes",
            f"ranks on one host must share its memory; got {hosts.count(twice)} groups of ranks on "
            f"{twice} that do not. Start them in one container.",
        )
    if not job.is_even:
        return Finding(
            Level.PROBLEM,
            "nodes",
            f"nodes must have equal numbers of ranks; got {shown}. Otherwise every rank counts as "
            "a node, with its own parameters and messages. Start the same number on each node: "
            "mpirun -ppn N (MPICH), --map-by ppr:N:node (Open MPI), srun --ntasks-per-node=N.",
        )
    ranks, nodes = _count(sizes[0], "rank"), _count(len(sizes), "node")
    each = f" each on {nodes}" if len(sizes) > 1 else f" on {nodes}"
    told = f"{ranks}{each}: one copy of the parameters per node."
    return Finding(Level.OK, "nodes", told)


def find_separated(job: Job) -> Finding | None:
    """Return a finding if ranks on one host have process IDs or mounts of their own."""
    for host in dict.fromkeys(node.host for node in job.nodes):
        here = [rank for rank in job.ranks if job.nodes[rank.node].host == host]
        groups: dict[tuple[str, ...], list[int]] = {}
        for rank in here:
            groups.setdefault(rank.namespaces, []).append(rank.rank)
        if len(groups) == 1:
            continue
        pids = {namespaces[:1] for namespaces in groups}
        what = "process IDs" if len(pids) > 1 else "mounts"
        shown = text.some([f"ranks {text.ranges(ranks)}" for ranks in groups.values()])
        return Finding(
            Level.PROBLEM,
            "nodes",
            f"ranks on one host must be in one container to share its memory; got {len(groups)} "
            f"groups with {what} of their own on {host}: {shown}. Each counts as a node, with its "
            "own parameters and messages. Start one container per host, or share process IDs "
            "and mounts (docker run --pid=host; shareProcessNamespace: true in a pod).",
        )
    return None


def _judge_cores(job: Job) -> Finding:
    busiest = max(job.nodes, key=lambda node: len(node.ranks) / node.num_cores)
    if len(busiest.ranks) > busiest.num_cores:
        return Finding(
            Level.NOTE,
            "cores",
            f"a node should have a core for each rank; got {_count(len(busiest.ranks), 'rank')} on "
            f"{_count(busiest.num_cores, 'core')} of {busiest.host}. Ranks take turns on a core: "
            "start fewer.",
        )
    for node in job.nodes:
        crowd, cores = find_crowd(job, node)
        if crowd:
            return Finding(
                Level.PROBLEM,
                "cores",
                f"ranks must have cores of their own; got ranks {text.ranges(crowd)} bound to "
                f"{_count(len(cores), 'core')} of {node.host}, {text.ranges(cores)}, while it has "
                f"{node.num_cores}. Bind them to different cores, or not at all: mpirun --bind-to "
                "none.",
            )
    least = min(job.ranks, key=lambda rank: rank.num_cores)
    node = job.nodes[least.node]
    share = node.num_cores // len(node.ranks)
    if 2 * least.num_cores <= share:
        return Finding(
            Level.NOTE,
            "cores",
            f"ranks should use all cores; got {_count(least.num_cores, 'core')} for rank "
            f"{least.rank}, whose share of {node.host} is {share}. Give it more: mpirun "
            f"--bind-to none, or --map-by slot:PE={share} (Open MPI).",
        )
    most = max(rank.num_cores for rank in job.ranks)
    more = " or more" if most > least.num_cores else ""
    told = f"{_count(least.num_cores, 'core')}{more} per rank for updates."
    return Finding(Level.OK, "cores", told)


def find_crowd(job: Job, node: Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find ranks of a node that outnumber the cores they are bound to (Hall's theorem).

    Returns:
        The ranks and their cores; both empty if there are no such ranks.
    """
    ranks = [job.ranks[rank] for rank in node.ranks]
    for cores in sorted({rank.cores for rank in ranks}, key=len):
        crowd = tuple(rank.rank for rank in ranks if set(rank.cores) <= set(cores))
        if len(crowd) > len(cores):
            return crowd, cores
    return (), ()


def _judge_threads(job: Job) -> Finding:
    wanted = [rank.omp_num_threads for rank in job.ranks]
    rank = min(job.ranks, key=lambda rank: rank.num_cores)
    advice = f"Set OMP_NUM_THREADS={rank.num_cores}, or torch.set_num_threads({rank.num_cores})."
    if None in wanted and any(len(rank.cores) > rank.num_cores for rank in job.ranks):
        most = max(len(rank.cores) for rank in job.ranks)
        return Finding(
            Level.NOTE,
            "threads",
            "OMP_NUM_THREADS should be set when ranks share cores; got none: BLAS and torch start "
            f"a thread on each of {most} cores in every rank. {advice}",
        )
    numbers = [int(word) for word in wanted if word and word.isdecimal()]
    if max(numbers, default=1) > max(rank.num_cores for rank in job.ranks):
        return Finding(
            Level.NOTE,
            "threads",
            f"OMP_NUM_THREADS should be a rank's share of the cores; got {max(numbers)}, while the "
            f"share is {rank.num_cores}. {advice}",
        )
    other = next((rank for rank, word in enumerate(wanted) if word != wanted[0]), None)
    if other is not None:
        return Finding(
            Level.NOTE,
            "threads",
            f"OMP_NUM_THREADS should be the same on all ranks; got {wanted[0] or 'none'} on rank "
            f"0 and {wanted[other] or 'none'} on rank {other}. Pass it on: mpirun -x "
            "OMP_NUM_THREADS (Open MPI), -genvlist OMP_NUM_THREADS (MPICH).",
        )
    return Finding(Level.OK, "threads", f"OMP_NUM_THREADS is {wanted[0] or 'not set'}.")


def _judge_thread_level(job: Job) -> Finding:
    level = job.library.thread_level
    if level != "multiple":
        told = (
            f"MPI should support calls from several threads; got thread level {level}. Gradients "
            "will not be sent while backward runs: leave mpi4py.rc.thread_level at its default, or "
            "use a library that was built with threads."
        )
        return Finding(Level.NOTE, "MPI threads", told)
    told = "thread level multiple: gradients can be sent while backward runs."
    return Finding(Level.OK, "MPI threads", told)


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"
