"""Judgements about the memory of nodes."""

from dataclasses import replace

import pytest

from shardopt.cli.doctor.facts import Slurm
from shardopt.cli.doctor.finding import Level
from shardopt.cli.doctor.memory_findings import room_for
from tests.support.doctor import OPENMPI, judge, make_job, with_node

LINUX = "jobacct_gather/linux"


def test_memory_that_cannot_be_shared():
    finding = judge(with_node(make_job(), 1, sharing_problem="got MPI_ERR_OTHER"), "shared memory")
    assert finding.level is Level.PROBLEM
    assert finding.text.startswith("ranks of h2 must be able to share memory; got MPI_ERR_OTHER.")


def test_the_largest_model():
    job = with_node(make_job(), 1, free_nbytes=16 << 30, memory_limit="/sys/fs/cgroup/memory.max")
    assert room_for(job, job.nodes[1]) == (16 << 30) // (4 + 2 * 4 + 4)  # moments on two nodes
    finding = judge(job, "free memory")
    assert finding.level is Level.OK
    told = "17.2 GB free on h2, below /sys/fs/cgroup/memory.max: enough for models of up to 1.07 G"
    assert finding.text == f"{told} float32 parameters."


@pytest.mark.parametrize(
    ("changes", "level", "told"),
    [
        ({"address_nbytes": 8 << 30}, Level.PROBLEM, "8.59 GB of addresses (ulimit -v): enough"),
        ({"address_nbytes": 80 << 30}, Level.OK, ""),
        ({"promise_nbytes": 8 << 30}, Level.PROBLEM, "with vm.overcommit_memory=2 every rank's"),
        ({"promise_nbytes": 96 << 30}, Level.OK, ""),
    ],
)
def test_limits_that_count_more_than_memory(changes, level, told):
    finding = judge(with_node(make_job(), 1, **changes), "free memory")
    assert finding.level is level
    assert told in finding.text


@pytest.mark.parametrize(
    ("size", "needed", "told"),
    [
        (0, 5 << 20, "for Open MPI's messages; got 0 B on h1, where it sends messages within"),
        (1 << 20, 5 << 20, "got 1.05 MB on h1, where it sends messages within a node through"),
        (64 << 20, 80 << 20, "should have 83.9 MB for Open MPI's messages; got 67.1 MB on h1,"),
        (64 << 20, 80 << 20, "where it may fill it with messages and die by a bus error."),
        (64 << 20, 20 << 20, None),
    ],
)
def test_messages_of_open_mpi(size, needed, told):
    job = replace(make_job((8,)), library=replace(OPENMPI, thread_level="multiple"))
    finding = judge(with_node(job, 0, shm_nbytes=size, mpi_shm_nbytes=needed), "/dev/shm")
    assert finding.level is (Level.NOTE if told else Level.OK)
    told = told or "Open MPI takes up to 21.0 MB of 67.1 MB on h1; shardopt puts nothing there."
    assert told in finding.text


@pytest.mark.parametrize(
    ("tracking", "told"),
    [
        ("pagemap", "got the pagemap, which takes 20 ms per GiB of weights in each step, on h2."),
        ("compare", "got a comparison of all weights in each step, after which every rank maps"),
    ],
)
def test_slower_ways_to_find_written_weights(tracking, told):
    reason = "The container's seccomp list refuses userfaultfd; allow that system call."
    finding = judge(
        with_node(make_job(), 1, tracking=tracking, tracking_reason=reason), "write tracking"
    )
    assert finding.level is Level.NOTE
    assert told in finding.text
    assert finding.text.endswith(f" on h2. {reason} Results are the same.")


def test_a_wrong_way_to_find_written_weights():
    reason = "SHARDOPT_WRITE_TRACKING must be one of a, b; got 'c'. Unset it."
    job = with_node(make_job(), 1, tracking=None, tracking_reason=reason)
    finding = judge(job, "write tracking")
    assert finding.level is Level.PROBLEM
    assert finding.text == f"on h2, {reason}"


@pytest.mark.parametrize(
    ("slurm", "level", "told"),
    [
        (Slurm(LINUX, "UsePss,OverMemoryKill"), Level.OK, "counts shared memory at most once."),
        (
            Slurm("jobacct_gather/cgroup", "OverMemoryKill"),
            Level.OK,
            "counts shared memory at most once.",
        ),
        (Slurm(LINUX, "OverMemoryKill"), Level.PROBLEM, "for each rank, and kills jobs by the sum"),
        (Slurm(LINUX, ""), Level.NOTE, "got JobAcctGatherParams=(null) without UsePss: it counts"),
    ],
)
def test_slurm(slurm, level, told):
    finding = judge(make_job(slurm=slurm), "Slurm")
    assert finding.level is level
    assert told in finding.text
