"""``hosts.sh`` and ``job.pbs`` on several hosts, with either MPI."""

import re
import sys

import pytest

from tests.support.launchers import LAUNCH, PAYLOAD, ROOT, Watched, launch, plain, run


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("h1 2 # a comment\n\nh2 slots=1\n")
    return path


def test_ranks_run_on_all_hosts_with_what_they_need(cluster, hostfile):
    hosts = cluster(2)
    job = hosts.on(1, *launch("hosts.sh", hostfile, "end 0"))
    assert job.returncode == 0, job.output
    places = re.findall(r"^rank (\d) of 3 on (h\d) with (\d), \d+ threads$", job.stdout, re.M)
    assert sorted(places) == [("0", "h1", "2"), ("1", "h1", "2"), ("2", "h2", "1")]
    assert job.stdout.count("ends\n") == 3


def test_a_rank_that_fails_ends_the_job_with_its_code(cluster, hostfile):
    job = cluster(2).on(1, *launch("hosts.sh", "--interface", "eth0", hostfile, "end 3"))
    assert job.returncode == 3, job.output


def test_ranks_on_all_hosts_save_when_they_are_told_to_end(cluster, hostfile):
    hosts = cluster(2)
    with Watched(hosts.start_on(1, *launch("hosts.sh", hostfile, "wait"))) as job:
        job.wait_for("waits", 3)
        hosts.on(1, "pkill", "-TERM", "-o", "-f", r"^bash \S*hosts.sh")
        job.end()
    assert job.output.count("saves, told 1 times") == 3, job.output


def test_a_host_that_is_lost_ends_the_job(cluster, hostfile):
    hosts = cluster(2)
    with Watched(hosts.start_on(1, *launch("hosts.sh", hostfile, "wait"))) as job:
        job.wait_for("waits", 3)
        hosts.kill(2)
        assert job.end() != 0, job.output
    assert hosts.on(1, "pgrep", "-f", PAYLOAD).stdout == ""


@pytest.mark.long
@pytest.mark.parametrize("lost", [1, 2])
def test_a_host_that_falls_silent_ends_the_job(cluster, tmp_path, lost):
    hosts = cluster(3)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h2 1\nh3 1\n" if lost == 1 else "h1 1\nh2 1\nh3 1\n")
    with Watched(hosts.start_on(1, *launch("hosts.sh", hostfile, "wait"))) as job:
        job.wait_for("waits", 2)
        hosts.drop(3)
        assert job.end() != 0, job.output
    assert hosts.on(1, "pgrep", "-f", PAYLOAD).stdout == ""


def test_pbs_runs_the_same_on_its_nodes(cluster, tmp_path):
    nodefile = tmp_path / "nodefile"
    nodefile.write_text("h2\nh1\nh2\n")
    settings = (
        f"PBS_O_WORKDIR={ROOT}",
        f"PBS_NODEFILE={nodefile}",
        f"COMMAND={sys.executable} {PAYLOAD} end 0",
    )
    job = cluster(2).on(1, *plain(*settings, "bash", LAUNCH / "job.pbs"))
    assert job.returncode == 0, job.output
    places = re.findall(r"^rank (\d) of 3 on (h\d) with (\d), \d+ threads$", job.stdout, re.M)
    assert sorted(places) == [("0", "h2", "2"), ("1", "h2", "2"), ("2", "h1", "1")]


MPIRUN = """#!/bin/bash
if [[ $1 == --version ]]; then echo "HYDRA build details"; exit; fi
echo "with $RANK_GPUS GPUs"
exit 9
"""


@pytest.mark.parametrize(
    ("options", "hosts", "ranks"),
    [
        ((), "h1:2,h2:1,h3:1", 4),
        (("--gpus-per-node", "4"), "h1:2,h2:1,h3:4", 7),
        (("--gpus-per-node=4", "--ranks=5"), "h1:2,h2:1,h3:4", 5),
    ],
)
def test_a_rank_for_each_gpu_of_hosts_without_a_number(hostfile, options, hosts, ranks):
    hostfile.write_text(hostfile.read_text() + "h3\n")
    mpirun = hostfile.with_name("mpirun")
    mpirun.write_text(MPIRUN)
    mpirun.chmod(0o755)
    words = ("bash", LAUNCH / "hosts.sh", *options, hostfile, "true")
    job = run(plain(f"MPIRUN={mpirun}", *words), hostfile.parent)
    assert job.returncode == 9
    assert f"-n {ranks} -launcher ssh -hosts {hosts} " in job.stdout
    assert f"with {'4' * bool(options)} GPUs" in job.stdout


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("h1 two\n", "HOSTFILE must have lines 'host ranks'; got 'h1 two'."),
        ("h1 0\n", "HOSTFILE must have lines 'host ranks'; got 'h1 0'."),
        ("# none\n", "HOSTFILE must name a host; "),
    ],
)
def test_mistakes_in_the_hostfile_are_named(hostfile, text, rule):
    hostfile.write_text(text)
    job = run(["bash", LAUNCH / "hosts.sh", hostfile, "true"], hostfile.parent)
    assert job.returncode == 2
    assert job.stderr.startswith(f"hosts.sh: {rule}")
