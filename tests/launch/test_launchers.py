"""The launchers as files: Bash can parse them, and they agree with each other."""

import subprocess

import pytest

from tests.support.launchers import LAUNCH, ROOT
from train_lm.options import parse_options

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", LAUNCH / "job.pbs"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script):
    check = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert check.stderr == ""


@pytest.mark.parametrize("script", ["quickstart.sh", "local.sh", "hosts.sh"])
def test_help_tells_how_to_use_it(script):
    command = ["bash", LAUNCH / script, "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"usage: bash launch/{script} ")


def test_the_kubernetes_job_runs_hosts_sh_on_its_workers():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    job = yaml.safe_load((LAUNCH / "mpijob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    replicas = job["spec"]["mpiReplicaSpecs"]
    pods = {name: replicas[name]["template"]["spec"] for name in ("Launcher", "Worker")}
    (launcher,), (worker,) = (pod["containers"] for pod in pods.values())
    assert launcher["command"][:3] == ["bash", "launch/hosts.sh", "/etc/mpi/hostfile"]
    program = launcher["command"].index("launch/train_lm.py")
    assert (ROOT / launcher["command"][program]).exists()
    assert parse_options(launcher["command"][program + 1 :]).checkpoint
    assert worker["volumeMounts"] == launcher["volumeMounts"]
    assert worker["image"] == launcher["image"]


@pytest.mark.parametrize("script", ["slurm.sbatch", "job.pbs"])
def test_the_batch_scripts_hold_what_schedulers_read(script):
    lines = (LAUNCH / script).read_text().splitlines()
    directives = [line for line in lines if line.startswith(("#SBATCH ", "#PBS "))]
    code = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert directives == [line for line in lines[:code] if line in directives]
    assert len(directives) >= 5


HALVES = r"""
source "$1"
job_id=job-1 job=$$ ended=() first_bad='' last_report_s='' killed=''
exec 3< <(printf 'a\n1%% [0<9] <job-1: rank 0 en'; sleep 1.5; printf 'ded with 3> b\nc')
relay_stderr 1
echo "rank 0 ended with ${ended[0]-none}"
"""


def test_a_report_that_arrives_in_two_parts_is_read():
    command = ["bash", "-euc", HALVES, "test", LAUNCH / "job.sh"]
    job = subprocess.run(command, capture_output=True, text=True, check=True)
    assert job.stdout == "rank 0 ended with 3\n"
    assert job.stderr == "a\n1% [0<9]  b\nc"
