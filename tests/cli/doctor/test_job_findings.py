"""Judgements about how a job was started."""

from dataclasses import replace

import pytest

from shardopt.cli.doctor import facts
from shardopt.cli.doctor.facts import Job
from shardopt.cli.doctor.finding import Level
from shardopt.cli.doctor.job_findings import judge_job
from shardopt.cli.doctor.memory_findings import room_for
from shardopt.cli.doctor.speed_findings import judge_speeds
from tests.support.doctor import (
    MPICH,
    MPICH_MPIRUN,
    OPENMPI,
    OPENMPI_MPIRUN,
    bound,
    judge,
    make_job,
    make_speeds,
    with_node,
)


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
        (OPENMPI, MPICH_MPIRUN, 1, "which sees 1 of them: every process would train on its own"),
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
    # each rank has its own parameters and gradients, and a third of the moments
    assert room_for(job, job.nodes[0]) == pytest.approx((64 << 30) / 2 / (8 + 8 / 3))
    assert "not estimated" in judge(job, "step").text


def test_two_groups_on_one_host():
    finding = judge(with_node(make_job(), 1, host="h1"), "nodes")
    assert finding.level is Level.PROBLEM
    assert "got 2 groups of ranks on h1" in finding.text


@pytest.mark.parametrize(
    ("other", "what"),
    [(("pid:2", "mnt:2"), "process IDs"), (("pid:1", "mnt:2"), "mounts")],
)
@pytest.mark.parametrize("together", [True, False])
def test_containers_on_one_host(other, what, together):
    """What separates the ranks is named, whether or not MPI takes them for one node."""
    job = make_job((4,)) if together else with_node(make_job((2, 2)), 1, host="h1")
    ranks = [replace(rank, namespaces=other) if rank.rank > 1 else rank for rank in job.ranks]
    finding = judge(replace(job, ranks=tuple(ranks)), "nodes")
    assert finding.level is Level.PROBLEM
    told = f"got 2 groups with {what} of their own on h1: ranks 0-1, ranks 2-3. Each counts as a"
    assert told in finding.text
    assert "shareProcessNamespace: true" in finding.text


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
        ([None] * 4, "got none: BLAS and torch start a thread on each of 8 cores in every rank"),
        (["8"] * 4, "got 8, while the share is 4. Set OMP_NUM_THREADS=4"),
        (["2", "2", "3", "2"], "got 2 on rank 0 and 3 on rank 2"),
    ],
)
def test_threads(numbers, told):
    job = make_job()
    ranks = [replace(r, omp_num_threads=n) for r, n in zip(job.ranks, numbers, strict=True)]
    finding = judge(replace(job, ranks=tuple(ranks)), "threads")
    assert finding.level is Level.NOTE
    assert told in finding.text


def test_levels_of_threads():
    job = make_job()
    single = replace(job, library=replace(job.library, thread_level="single"))
    assert judge(single, "MPI threads").level is Level.NOTE
