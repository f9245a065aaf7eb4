"""``slurm.sbatch`` under a real Slurm, with srun and with mpirun, with either MPI."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cluster as cluster_module
from tests.support.launchers import LAUNCH, PAYLOAD, ROOT, plain, run, wait_until

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


PROGRAMS = {
    "mpirun": """echo "HYDRA build details" """,
    "srun": """if [[ $1 == --mpi=list ]]; then echo pmi2; else echo "bound: $SLURM_GPU_BIND"; fi""",
}


@pytest.mark.parametrize(
    ("variables", "bound", "told"),
    [
        ((), "", False),
        (("SLURM_GPUS_ON_NODE=4", "SLURM_GPUS_PER_NODE=4"), "none", False),
        (("SLURM_GPUS_ON_NODE=4", "SLURM_GPU_BIND=closest"), "closest", False),
        (("SLURM_GPUS_ON_NODE=4", "SLURM_GPUS_PER_TASK=1"), "none", True),
    ],
)
def test_tasks_see_all_gpus_of_their_node(tmp_path, variables, bound, told):
    """With programs in the place of Slurm's, which would need GPUs to give away."""
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    places = (f"PATH={tmp_path}:/usr/bin:/bin", f"SLURM_SUBMIT_DIR={ROOT}", "SLURM_JOB_ID=7")
    settings = (*places, *variables)
    job = run(plain(*settings, "bash", LAUNCH / "slurm.sbatch", "true"), tmp_path)
    assert job.returncode == 0, job.stderr
    assert job.stdout.splitlines()[-1] == f"bound: {bound}"
    assert ("slurm.sbatch: --gpus-per-task should be left out; got 1." in job.stderr) == told


@pytest.mark.parametrize(
    "answer",
    ["echo none", 'if [[ $1 == --mpi=list ]]; then echo pmi2; else echo "no PMI" >&2; exit 1; fi'],
)
def test_mpirun_starts_the_ranks_where_srun_cannot(tmp_path, answer):
    """With programs in the place of Slurm's, whose plugins are whatever the machine has."""
    programs = {"mpirun": 'if [[ $1 == --version ]]; then echo HYDRA; else echo "mpirun $*"; fi'}
    for name, body in (programs | {"srun": answer}).items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    settings = (f"PATH={tmp_path}:/usr/bin:/bin", f"SLURM_SUBMIT_DIR={ROOT}", "SLURM_NTASKS=2")
    job = run(plain(*settings, "SLURM_JOB_ID=7", "bash", LAUNCH / "slurm.sbatch", "true"), tmp_path)
    assert "mpirun -n 2" in job.stdout
    assert "slurm.sbatch: srun cannot start ranks of" in job.stderr
    assert "mpirun starts them instead." in job.stderr
