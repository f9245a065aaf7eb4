"""``slurm.sbatch`` under a real Slurm, with srun and with mpirun, with either MPI."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cluster as cluster_module
from tests.support.launchers import LAUNCH, PAYLOAD, ROOT, plain, wait_until

SLURM = Path(cluster_module.__file__).with_name("slurm.sh")


@pytest.fixture(scope="session")
def can_have_slurm():
    check = subprocess.run(["bash", SLURM, "check"], capture_output=True, text=True, check=False)
    if check.returncode:
        pytest.skip(check.stderr.strip())


@pytest.fixture
def slurm(can_have_slurm, cluster):
    """Start Slurm on two hosts; returns a function that runs its commands there."""
    hosts = cluster(2)
    started = hosts.on(1, "bash", SLURM, "start", "2")
    assert started.returncode == 0, started.output

    def run(*command):
        job = hosts.on(1, *plain("bash", SLURM, "run", *command))
        assert job.returncode == 0, job.output
        return job.stdout.strip()

    hosts.folder = ROOT  # where sbatch is called
    return run


@pytest.mark.parametrize(
    "starter",
    [
        pytest.param((), id="srun"),
        pytest.param(("--mpirun",), id="mpirun", marks=pytest.mark.long),
    ],
)
def test_a_job_that_must_leave_saves_and_goes_on_later(slurm, tmp_path, starter):
    out = tmp_path / "out"
    shape = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={out}")
    command = (LAUNCH / "slurm.sbatch", *starter, sys.executable, PAYLOAD, "wait")
    number = slurm("sbatch", "--parsable", *shape, *command)

    def printed(text, count):
        return out.exists() and out.read_text().count(text) >= count

    def state():
        return slurm("squeue", "-h", "-j", number, "-o", "%T")

    wait_until(lambda: printed("waits", 4))
    slurm("scancel", "--batch", "--signal=USR1", number)  # as --signal=B:USR1@120 does, in time
    wait_until(lambda: printed("queued again", 1) and state() == "PENDING")
    assert printed("saves, told 1 times", 4), out.read_text()
    wait_until(lambda: state() not in ("PENDING", "RUNNING", "COMPLETING"))
    assert printed("ends", 4), out.read_text() + slurm("scontrol", "show", "job", number)
    assert "on h1 with 2, 1 threads" in out.read_text()
    assert "on h2 with 2, 1 threads" in out.read_text()
