"""``shardopt doctor``: what it finds out, how it judges that, and that it never waits for ever."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shardopt.cli import main, text
from shardopt.cli.doctor import facts, library
from shardopt.cli.doctor.facts import Job, Library, Link, Node, Rank, Speeds
from shardopt.cli.doctor.finding import Level
from shardopt.cli.doctor.job_findings import judge_job, room_for
from shardopt.cli.doctor.render import render
from shardopt.cli.doctor.speed_findings import judge_speeds, network_seconds, update_seconds
from tests.conftest import read_job_env

ROOT = Path(__file__).parents[2]
DOCTOR = ["-m", "shardopt.cli", "doctor"]
ADVICE = re.compile(r".+ (must|should) .+; got .+\. .+", re.DOTALL)

MPICH = Library("MPICH", "5.0.2", "5.0", "/v/lib/libmpi.so.12", "/v/bin/mpirun", "4.1", None, None)
OPENMPI = replace(MPICH, name="Open MPI", version="5.0.11", standard="3.1")
MPICH_MPIRUN = facts.Launcher("MPICH's mpirun", "MPICH", 4, 0)
OPENMPI_MPIRUN = facts.Launcher("Open MPI's mpirun", "Open MPI", 4, 0)


# -- judging: made-up jobs -------------------------------------------------------------------------


def make_node(host, ranks, **changes):
    node = Node(host, tuple(ranks), 8, 64 << 30, 32 << 30, 24 << 30, 0, None)
    return replace(node, **changes)


def make_job(sizes=(2, 2), cores=range(8), omp="4", **changes):
    """A healthy job of ranks that are not bound, of 8 cores a node."""
    nodes, ranks = [], []
    for number, size in enumerate(sizes):
        here = range(len(ranks), len(ranks) + size)
        nodes.append(make_node(f"h{number + 1}", here))
        ranks += [Rank(rank, number, tuple(cores), max(1, 8 // size), omp, None) for rank in here]
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
    return replace(speeds, **changes)


def judge(job, topic, speeds=None):
    """The one finding about a topic."""
    findings = judge_job(job)
    if job.launcher_fits:
        findings += judge_speeds(job, speeds or make_speeds(job))
    assert all(
        f.level is Level.OK or f.topic == "GPUs" or ADVICE.fullmatch(f.text) for f in findings
    )
    (finding,) = [finding for finding in findings if finding.topic == topic]
    return finding


@pytest.mark.parametrize("sizes", [(1,), (8,), (1, 1), (4, 4, 4)])
def test_a_healthy_job_has_no_problems(sizes):
    job = make_job(sizes, omp=str(8 // sizes[0]))
    findings = judge_job(job) + judge_speeds(job, make_speeds(job))
    assert {finding.level for finding in findings} == {Level.OK}
    assert len({finding.topic for finding in findings}) == len(findings)


@pytest.mark.parametrize(
    ("library", "launcher", "sees", "told"),
    [
        (
            MPICH,
            OPENMPI_MPIRUN,
            1,
            "Open MPI's mpirun with 4 processes and the library MPICH 5.0.2",
        ),
        (OPENMPI, MPICH_MPIRUN, 1, "which sees 1 of them: every process would train alone"),
    ],
)
def test_a_launcher_of_another_library(library, launcher, sees, told):
    job = Job(library, launcher, None, sees)
    finding = judge(job, "launcher")
    assert finding.level is Level.PROBLEM
    assert told in finding.text
    assert "/v/bin/mpirun" in finding.text


def test_without_a_launcher_the_shell_would_find_another():
    job = make_job((1,), launcher=None, mpirun=facts.Mpirun("/usr/bin/mpirun", "Open MPI"))
    assert judge(job, "launcher").level is Level.PROBLEM
    job = replace(job, mpirun=facts.Mpirun("/v/bin/mpirun", "MPICH"))
    assert judge(job, "launcher").level is Level.OK


def test_slurm_starts_any_library():
    for mpi in (MPICH, OPENMPI):
        srun = facts.Launcher("Slurm's srun", None, 4, 0)
        assert judge(make_job(launcher=srun, library=mpi), "launcher").level is Level.OK


def test_nodes_of_unequal_sizes():
    job = make_job((2, 1))
    finding = judge(job, "nodes")
    assert finding.level is Level.PROBLEM
    assert "got h1 2, h2 1" in finding.text
    assert room_for(job, job.nodes[0]) == (24 << 30) // 16  # each rank its own parameters
    assert "not estimated" in judge(job, "step").text


def test_two_groups_on_one_host():
    finding = judge(with_node(make_job(), 1, host="h1"), "nodes")
    assert finding.level is Level.PROBLEM
    assert "got 2 groups of ranks on h1" in finding.text


def test_more_ranks_than_cores():
    finding = judge(make_job((9, 9)), "cores")
    assert finding.level is Level.NOTE
    assert "got 9 ranks on 8 cores of h1" in finding.text


@pytest.mark.parametrize(
    ("cores", "told"),
    [
        ([(0,), (0,), (1, 2), (3,)], "got ranks 0-1 bound to 1 core of h1, 0, while it has 8"),
        ([(0, 1), (0, 1), (0,), (5,)], "got ranks 0-2 bound to 2 cores of h1, 0-1"),
    ],
)
def test_ranks_bound_to_the_same_cores(cores, told):
    finding = judge(bound(make_job((4,)), *cores), "cores")
    assert finding.level is Level.PROBLEM
    assert told in finding.text


def test_ranks_bound_apart_to_too_few_cores():
    finding = judge(bound(make_job((2,)), (0, 1), (2, 3)), "cores")
    assert finding.level is Level.NOTE
    assert "got 2 cores for rank 0, whose share of h1 is 4" in finding.text
    assert judge(bound(make_job((2,)), (0, 1, 2, 3), (4, 5, 6, 7)), "cores").level is Level.OK


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ([None] * 4, "got none: in every rank BLAS and torch start a thread on each of 8 cores"),
        (["8"] * 4, "got 8 where that is 4. Set OMP_NUM_THREADS=4"),
        (["2", "2", "3", "2"], "got 2 on rank 0 and 3 on rank 2"),
    ],
)
def test_threads(numbers, told):
    job = make_job()
    ranks = [replace(r, omp_num_threads=n) for r, n in zip(job.ranks, numbers, strict=True)]
    finding = judge(replace(job, ranks=tuple(ranks)), "threads")
    assert finding.level is Level.NOTE
    assert told in finding.text


def test_a_small_shared_memory():
    job = with_node(make_job(), 1, shm_nbytes=64 << 20, shm_free_nbytes=60_000_000)
    assert room_for(job, job.nodes[1]) == 60_000_000 // (4 * (1 + 2))
    finding = judge(job, "shared memory")
    assert finding.level is Level.PROBLEM
    assert "got 60.0 MB free on h2: enough for 5.00 M float32 parameters" in finding.text
    job = with_node(make_job(), 0, shm_nbytes=None, shm_free_nbytes=None)
    assert judge(job, "shared memory").level is Level.PROBLEM


def test_windows_that_are_not_shared():
    finding = judge(with_node(make_job(), 1, window_problem="got MPI_ERR_OTHER"), "windows")
    assert finding.level is Level.PROBLEM
    assert finding.text.startswith("ranks of h2 must be able to share memory; got MPI_ERR_OTHER.")


def test_levels_of_threads_and_gpus():
    job = make_job()
    single = replace(job, library=replace(job.library, thread_level="single"))
    assert judge(single, "MPI threads").level is Level.NOTE
    finding = judge(with_node(job, 0, num_gpus=4), "GPUs")
    assert finding.level is Level.NOTE
    assert finding.text.startswith("4 GPUs; ")


@pytest.mark.parametrize(
    ("changes", "topic", "level", "told"),
    [
        (
            {"memory": (90e9, 30e9, 80e9)},
            "memory",
            Level.NOTE,
            "30.0 GB/s on h2 and 90.0 GB/s on h1",
        ),
        ({"barrier_s": (None, 4e-3, 1e-6)}, "barrier", Level.NOTE, "got 4.00 ms on h2"),
        (
            {"links": [1e9, 0.4e9, 1.1e9]},
            "links",
            Level.PROBLEM,
            "400 MB/s each way between h2 and h3",
        ),
        (
            {"links": [1e8, 1.2e8, 1.1e8]},
            "links",
            Level.NOTE,
            "faster than plain Ethernet; got 100 MB/s",
        ),
        ({"exchange": 0.5e9}, "all links", Level.NOTE, "got 500 MB/s from h1 while all"),
    ],
)
def test_what_is_slow(changes, topic, level, told):
    job = make_job((2, 2, 2))
    finding = judge(job, topic, make_speeds(job, **changes))
    assert finding.level is level
    assert told in finding.text


def test_a_long_latency():
    job = make_job()
    speeds = make_speeds(job)
    slow = replace(speeds, links=(replace(speeds.links[0], latency_s=3e-3),))
    finding = judge(job, "latency", slow)
    assert finding.level is Level.NOTE
    assert "got 3.00 ms between h1 and h2" in finding.text


def test_the_time_of_a_step():
    job = make_job((2, 2, 2, 2))
    speeds = make_speeds(job, exchange=0.1e9)
    # 400 MB of gradients to their owners and of parameters back, 3/4 of each over a node's link
    assert network_seconds(speeds, 100_000_000) == pytest.approx(2 * 0.3e9 / 0.1e9)
    # two float32 gradients, and a quarter of 3 arrays read and written
    assert update_seconds(job, speeds, 100_000_000) == pytest.approx((8 + 24 / 4) * 1e8 / 100e9)
    told = judge(job, "step", speeds).text
    assert "take 6.00 s between the nodes and 14.0 ms of memory's time" in told
    assert "the network bounds a step" in told
    one = make_job((2,))
    assert "there is one node" in judge(one, "network").text
    assert "takes 32.0 ms" in judge(one, "step").text


# -- writing ---------------------------------------------------------------------------------------


def test_the_report_fits_a_terminal():
    job = make_job((4,) * 60, omp="2")
    for number in range(60):
        job = with_node(job, number, host=f"compute-{number:03d}.rack-7.example.org")
    speeds = make_speeds(job, links=[1e9 + node for node in range(60)])
    findings = judge_job(job) + judge_speeds(job, speeds)
    report = render(job, speeds, findings)
    assert max(map(len, report.splitlines())) <= 100
    assert report.count("and 28 more") == 2
    words = report.split()
    for finding in findings:
        told = finding.text.split()
        assert any(words[i : i + len(told)] == told for i in range(len(words))), finding
    assert report.endswith("no problems")


def test_times_ranges_and_cuts_for_people():
    times = [2e-8, 1.5e-6, 999.6e-6, 0.0123, 1.0, 75.0]
    assert list(map(text.seconds, times)) == [
        "0.02 us",
        "1.50 us",
        "1.00 ms",
        "12.3 ms",
        "1.00 s",
        "75.0 s",
    ]
    assert text.ranges([5, 0, 1, 2, 9, 8]) == "0-2,5,8-9"
    assert text.clip("a-long-name", 8) == "a-long.."


# -- finding out -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "name", "family"),
    [
        ("MPICH Version:      5.0.2", ("MPICH", "5.0.2"), "MPICH"),
        ("MVAPICH Version      :\t4.1", ("MVAPICH", "4.1"), "MPICH"),
        ("Open MPI v5.0.11, package: Open MPI x", ("Open MPI", "5.0.11"), "Open MPI"),
        ("Intel(R) MPI Library 2021.9 for Linux* OS", ("Intel(R) MPI", "2021.9"), "MPICH"),
        ("something else", ("something else", ""), "something else"),
    ],
)
def test_names_of_libraries(line, name, family):
    assert library.parse_name(line) == name
    assert replace(MPICH, name=name[0]).family == family


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, ("MPICH", 2, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"}, ("Open MPI", 3, 0)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (None, 4, 3)),
        (
            {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "PMI_SIZE": "4", "PMI_RANK": "2"},
            (None, 4, 2),
        ),
    ],
)
def test_launchers(environ, found):
    launcher = library.find_launcher(environ)
    assert (launcher and (launcher.family, launcher.num_processes, launcher.rank)) == found


def test_rounds_pair_all_neighbours_and_no_node_twice():
    from shardopt.cli.doctor.measure import plan_rounds

    assert plan_rounds(1) == []
    assert plan_rounds(2) == [[(0, 1)]]
    for count in range(3, 10):
        rounds = plan_rounds(count)
        assert len(rounds) == 2 + count % 2
        for pairs in rounds:
            assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)
        ring = [(node, (node + 1) % count) for node in range(count)]
        assert sorted(pair for pairs in rounds for pair in pairs) == ring


def test_messages_are_of_sensible_size_and_number():
    from shardopt.cli.doctor.measure import plan_messages

    for rate in (1e3, 1e7, 1e9, 1e12):
        nbytes, count = plan_messages(rate, 0.5)
        assert 64 << 10 <= nbytes <= 16 << 20
        assert count >= 3
        assert count == 3 or nbytes * count <= rate * 0.5


@pytest.mark.mpi
@pytest.mark.parametrize("max_nodes", [1, 2, 4])
def test_measurements_of_any_nodes(comm, max_nodes):
    """The ranks of one machine play nodes, also of unequal sizes: all goes on as between hosts."""
    from shardopt.cli.doctor.job import describe_job
    from shardopt.cli.doctor.measure import measure, plan_rounds
    from shardopt.cli.doctor.watch import Watch
    from shardopt.comm.topology import Topology

    colors = [rank % max_nodes for rank in range(comm.size)]
    count = len(set(colors))
    places = [(color, colors[:rank].count(color)) for rank, color in enumerate(colors)]
    node_comm, lane_comm = comm.Split(colors[comm.rank]), comm.Split(places[comm.rank][1])
    hosts = ("host",) * comm.size
    topology = Topology(comm.Dup(), node_comm, lane_comm, tuple(places), hosts)
    watch = Watch(60.0, comm.rank)
    ranks, nodes = describe_job(topology, watch)
    speeds = measure(topology, watch, budget_s=0.2)
    topology.free()
    if comm.rank:
        assert (ranks, nodes, speeds) == ((), (), None)
        return
    assert [rank.node for rank in ranks] == colors
    assert [node.ranks for node in nodes] == [
        tuple(rank for rank in range(comm.size) if colors[rank] == color) for color in range(count)
    ]
    assert not any(node.window_problem for node in nodes)
    pairs = sorted(pair for pairs in plan_rounds(count) for pair in pairs)
    assert [link.nodes for link in speeds.links] == pairs
    for rates in (speeds.memory, speeds.exchange or speeds.memory):
        assert len(rates) == count
        assert min(rates) > 0
    assert all(link.latency_s > 0 and link.nbytes_per_s > 0 for link in speeds.links)
    assert [bool(barrier) for barrier in speeds.barrier_s] == [len(n.ranks) > 1 for n in nodes]


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def run(mpirun):
    def run(num_ranks, *args, **settings):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return mpirun(num_ranks, *args, env={"PYTHONPATH": path}, **settings)

    return run


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_job_of_this_machine(run, num_ranks):
    job = run(num_ranks, *DOCTOR, "--quick", "--json")
    content = json.loads(job.stdout)  # one object, though all ranks ran
    problems = [f for f in content["findings"] if f["level"] == "problem"]
    assert job.returncode == bool(problems), job.output
    found, speeds = content["job"], content["speeds"]
    assert found["world_size"] == found["launcher"]["num_processes"] == num_ranks
    assert found["library"]["name"] in found["launcher"]["name"]
    assert found["library"]["thread_level"] == "multiple"
    assert Path(found["library"]["path"]).exists()
    (node,) = found["nodes"]
    assert node["host"] == os.uname().nodename
    assert node["ranks"] == list(range(num_ranks))
    assert node["window_problem"] is None
    shm = os.statvfs("/dev/shm")
    assert node["shm_nbytes"] == shm.f_blocks * shm.f_frsize
    assert 0 < node["shm_free_nbytes"] <= node["shm_nbytes"]
    assert [rank["rank"] for rank in found["ranks"]] == list(range(num_ranks))
    assert {rank["omp_num_threads"] for rank in found["ranks"]} == {"1"}
    assert {tuple(rank["cores"]) for rank in found["ranks"]} == {
        tuple(sorted(os.sched_getaffinity(0)))
    }
    assert speeds["memory"][0] > 0
    assert bool(speeds["barrier_s"][0]) == (num_ranks > 1)
    assert speeds["links"] == speeds["exchange"] == []
    assert {"launcher", "nodes", "windows", "network", "step"} <= {
        finding["topic"] for finding in content["findings"]
    }


def alone(*words, **environ):
    """Run the command without mpirun."""
    return subprocess.run(
        [sys.executable, *DOCTOR, "--quick", *words],
        capture_output=True,
        text=True,
        timeout=60,
        # The last for Open MPI, which leaves 16 MiB in /dev/shm where mpirun did not start it.
        env={
            **os.environ,
            **read_job_env(),
            "PYTHONPATH": str(ROOT),
            **environ,
            "OMPI_MCA_btl": "self",
        },
    )


@pytest.mark.mpirun
def test_without_mpirun():
    done = alone()
    assert "launcher     none\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert ("problem " in done.stdout) == bool(done.returncode)


@pytest.mark.mpirun
def test_the_wrong_mpirun_is_told_once_and_by_name():
    from mpi4py import MPI

    ours = MPI.Get_library_version().startswith("MPICH")
    others = "OMPI_COMM_WORLD" if ours else "PMI"  # what the other's mpirun sets
    first, second = (alone(**{f"{others}_SIZE": "2", f"{others}_RANK": rank}) for rank in "01")
    told = "launcher and MPI library must belong together; got"
    assert first.returncode == 1
    assert told in " ".join(first.stdout.split()), first.stdout + first.stderr
    assert "Traceback" not in first.stderr
    assert (second.returncode, second.stdout) == (0, "")


ABSENT = """
import os, signal, sys
from shardopt.cli import main
absent = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1"
if sys.argv[1] == "after the start":
    import shardopt.cli.doctor.measure  # slow imports take nothing off the time allowed
    from mpi4py import MPI
    MPI.COMM_WORLD.Barrier()
if absent:
    signal.pause()
sys.exit(main(["doctor", "--quick", "--timeout", "1"]))
"""


@pytest.mark.parametrize(
    ("when", "told"),
    [
        ("before the start", "the start of MPI must end within 1 s; got no end of it. See "),
        ("after the start", "every rank must come to the search for nodes within 1 s; got no sign "
         "of rank 1. See "),
    ],
)  # fmt: skip
def test_a_rank_that_does_not_come_ends_the_job(run, when, told):
    job = run(3, when, source=ABSENT)
    assert job.returncode != 0
    assert job.stderr.count(f"shardopt doctor: {told}") == 1, job.output
    assert "MPI library" not in job.stdout


@pytest.mark.parametrize("words", [["--timeout", "0"], ["--timeout", "soon"], ["--what"]])
def test_wrong_arguments(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *words])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("shardopt doctor: arguments must be as --help says; got: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], ["doctor", "--help"]])
def test_the_help_names_it(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    assert "xamine an MPI job" in capsys.readouterr().out


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    told = capsys.readouterr().out
    assert "example:\n  mpirun -n 4 shardopt doctor" in told
    assert "exit code:\n  0  no problem\n  1  " in told
    assert max(map(len, told.splitlines())) <= 100
