"""The virtual hosts that other tests rely on."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.support.cluster import Cluster

ROOT = Path(__file__).parents[2]

WHO = r"""
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
node = comm.Split_type(MPI.COMM_TYPE_SHARED)
row = np.full(1 << 20, comm.rank, np.uint8)
comm.Allreduce(MPI.IN_PLACE, row, MPI.MAX)
print(f"{MPI.Get_processor_name()} {comm.size} {node.size} {row.min()}\n", end="", flush=True)
"""


def test_ranks_see_a_node_for_each_host_and_meet_over_its_network(cluster):
    hosts = cluster(2, slots=2)
    before = hosts.bytes()
    job = hosts.mpirun(4, source=WHO)
    assert job.returncode == 0, job.output
    assert sorted(job.stdout.splitlines()) == ["h1 4 2 3"] * 2 + ["h2 4 2 3"] * 2
    after = hosts.bytes()
    for host in (1, 2):
        assert after[host].sent - before[host].sent > 1 << 20
        assert after[host].received - before[host].received > 1 << 20


def reaches(hosts, other):
    """Whether host 1 gets through to another by ssh."""
    command = ("ssh", "-o", "ConnectTimeout=1", f"h{other}", "hostname")
    job = hosts.on(1, *command)
    assert job.stdout in (f"h{other}\n", "")
    return job.stdout != ""


@pytest.fixture
def make(can_have_clusters, tmp_path):
    """Make clusters, in tests that no MPI takes part in and that run once."""
    with ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(Cluster(tmp_path, *args, **settings))


def test_a_host_can_be_lost_and_come_back(make):
    hosts = make(2)
    assert reaches(hosts, 2)
    for fault, remedy in ((hosts.kill, hosts.boot), (hosts.cut, hosts.heal)):
        fault(2)
        assert not reaches(hosts, 2)
        remedy(2)
        assert reaches(hosts, 2)
    hosts.drop(2)
    assert not reaches(hosts, 2)


def test_clusters_do_not_see_one_another(make):
    one, other = make(1), make(2)
    assert not reaches(one, 2)
    assert reaches(other, 2)
    one.close()
    assert reaches(other, 2)


def test_a_rate_limits_what_a_host_sends(make):
    hosts = make(1, rate="100mbit")
    assert "rate 100Mbit" in hosts.on(1, "tc", "qdisc", "show", "dev", "eth0").stdout
    hosts.rate(None)
    assert "rate" not in hosts.on(1, "tc", "qdisc", "show", "dev", "eth0").stdout


KILLED = """
import sys, time
from pathlib import Path
from tests.support.cluster import Cluster

hosts = Cluster(Path.cwd(), 1)
hosts.start_on(1, "sleep", "1000")
print(hosts._hold.pid, flush=True)
time.sleep(1000)
"""


def test_nothing_is_left_when_pytest_is_killed(can_have_clusters, tmp_path):
    pytest_run = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with pytest_run:
        hold = psutil.Process(int(pytest_run.stdout.readline()))
        processes = [hold, *hold.children(recursive=True)]
        assert any("sshd" in process.name() for process in processes)
        pytest_run.kill()
        _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    assert list(tmp_path.iterdir()) == []
