"""Jobs that were never started, for the judgements of ``shardopt doctor``."""

import re
from dataclasses import replace

from shardopt.cli.doctor import facts
from shardopt.cli.doctor.facts import Job, Library, Link, Node, Rank, Speeds
from shardopt.cli.doctor.finding import Level
from shardopt.cli.doctor.job_findings import judge_job
from shardopt.cli.doctor.speed_findings import judge_speeds

ADVICE = re.compile(r".+ (must|should) .+; got .+\. .+", re.DOTALL)

MPICH = Library("MPICH", "5.0.2", "5.0", "/v/lib/libmpi.so.12", "/v/bin/mpirun", "4.1", None, None)
OPENMPI = replace(MPICH, name="Open MPI", version="5.0.11", standard="3.1")
MPICH_MPIRUN = facts.Launcher("MPICH's mpirun", "MPICH", 4, 0)
OPENMPI_MPIRUN = facts.Launcher("Open MPI's mpirun", "Open MPI", 4, 0)


def make_node(host, ranks, **changes):
    node = Node(
        host=host,
        ranks=tuple(ranks),
        num_cores=8,
        free_nbytes=64 << 30,
        memory_limit=None,
        address_nbytes=None,
        promise_nbytes=None,
        shm_nbytes=64 << 20,
        mpi_shm_nbytes=22 << 20,
        tracking="userfaultfd",
        tracking_reason=None,
        num_gpus=0,
        sharing_problem=None,
    )
    return replace(node, **changes)


def make_job(sizes=(2, 2), cores=range(8), omp="4", **changes):
    """A healthy job of ranks that are not bound, of 8 cores a node."""
    nodes, ranks = [], []
    for number, size in enumerate(sizes):
        here = range(len(ranks), len(ranks) + size)
        nodes.append(make_node(f"h{number + 1}", here))
        ranks += [
            Rank(rank, number, tuple(cores), max(1, 8 // size), omp, None, ("pid:1", "mnt:1"))
            for rank in here
        ]
    launcher = replace(MPICH_MPIRUN, num_processes=len(ranks))
    library = replace(MPICH, thread_level="multiple")
    job = Job(library, launcher, None, len(ranks), tuple(ranks), tuple(nodes))
    return replace(job, **changes)


def with_node(job, number, **changes):
    nodes = list(job.nodes)
    nodes[number] = replace(nodes[number], **changes)
    return replace(job, nodes=tuple(nodes))


def bound(job, *cores):
    ranks = [
        replace(rank, cores=mine, num_cores=len(mine))
        for rank, mine in zip(job.ranks, cores, strict=True)
    ]
    return replace(job, ranks=tuple(ranks))


def make_speeds(job, links=None, exchange=1.1e9, **changes):
    count = len(job.nodes)
    pairs = {1: [], 2: [(0, 1)]}.get(count, [(node, (node + 1) % count) for node in range(count)])
    rates = links or [1.2e9] * len(pairs)
    found = tuple(Link(pair, 20e-6, rate) for pair, rate in zip(pairs, rates, strict=True))
    speeds = Speeds((100e9,) * count, (5e-6,) * count, found, (exchange,) * count if found else ())
    if found:
        speeds = replace(speeds, message_s=(15e-6,) * count)
    return replace(speeds, **changes)


def judge(job, topic, speeds=None):
    """The one finding about a topic."""
    findings = judge_job(job)
    if job.launcher_fits:
        findings += judge_speeds(job, speeds or make_speeds(job))
    assert all(f.level is Level.OK or ADVICE.fullmatch(f.text) for f in findings)
    (finding,) = [finding for finding in findings if finding.topic == topic]
    return finding
