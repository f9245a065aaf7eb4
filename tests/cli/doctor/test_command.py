"""``shardopt doctor`` as it is called: its report, its deadlines, its help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardopt.cli import main
from shardopt.planner.machine import read_calibration
from tests.conftest import read_job_env
from tests.support.shm import limit_shm

ROOT = Path(__file__).parents[3]
DOCTOR = ["-m", "shardopt", "doctor"]


@pytest.fixture
def run(mpirun):
    def run(num_ranks, *args, env=None, **settings):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return mpirun(num_ranks, *args, env={"PYTHONPATH": path, **(env or {})}, **settings)

    return run


@pytest.mark.parametrize(
    "num_ranks",
    [
        pytest.param(1, marks=pytest.mark.any_mpi),
        pytest.param(2, marks=pytest.mark.thorough),
        3,
    ],
)
def test_a_job_of_this_machine(run, num_ranks, tmp_path):
    file = tmp_path / "speeds.json"
    job = run(num_ranks, *DOCTOR, "--quick", "--json", "--calibrate", file)
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
    assert node["sharing_problem"] is None
    shm = os.statvfs("/dev/shm")
    assert node["shm_nbytes"] == shm.f_blocks * shm.f_frsize
    assert 0 < node["mpi_shm_nbytes"] <= node["shm_nbytes"]
    assert node["free_nbytes"] > 0
    assert node["tracking"] in ("userfaultfd", "pagemap", "compare")
    assert (node["tracking"] == "userfaultfd") == (node["tracking_reason"] is None)
    assert [rank["rank"] for rank in found["ranks"]] == list(range(num_ranks))
    assert {rank["omp_num_threads"] for rank in found["ranks"]} == {"1"}
    assert {tuple(rank["cores"]) for rank in found["ranks"]} == {
        tuple(sorted(os.sched_getaffinity(0)))
    }
    if node["num_gpus"] == 0:
        assert [rank["gpu"] for rank in found["ranks"]] == [None] * num_ranks
        assert node["peers"] is None
        (gpus,) = [f for f in content["findings"] if "GPU" in f["topic"]]
        assert gpus["text"] == "none; shardopt needs none."
    assert speeds["memory"][0] > 0
    calibrated = read_calibration(file)
    assert calibrated["memory_nbytes_per_s"] == speeds["updates"][0] > 0
    assert calibrated["disk_nbytes_per_s"] == speeds["disk"][0] > 0
    assert ("barrier_s" in calibrated) == (num_ranks > 1)
    assert not {"link_nbytes_per_s", "latency_s", "message_s"} & set(calibrated)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert bool(speeds["barrier_s"][0]) == (num_ranks > 1)
    assert speeds["links"] == speeds["exchange"] == []
    assert {"launcher", "nodes", "shared memory", "/dev/shm", "write tracking", "step"} <= {
        finding["topic"] for finding in content["findings"]
    }


def loads_mpich():
    from mpi4py import MPI

    return MPI.Get_library_version().startswith("MPICH")


def test_a_dev_shm_too_small_for_mpich(run, mpirun):
    """MPI is not started where it may crash; without UCX's part it needs less."""
    if not loads_mpich():
        pytest.skip("only MPICH may crash")
    settings = {"options": limit_shm(mpirun, "3m")}
    job = run(2, *DOCTOR, "--quick", "--json", **settings)
    assert (job.returncode, job.stderr) == (1, "")
    fits, where, shm = json.loads(job.stdout)["findings"]  # one object, though both ranks ran
    assert (fits["topic"], fits["level"]) == ("launcher", "ok")
    assert (where["topic"], where["level"]) == ("environment", "ok")
    assert (shm["topic"], shm["level"]) == ("/dev/shm", "problem")
    told = "/dev/shm must have 10,936,320 bytes for the messages of MPICH on 2 ranks; got 3,145,728"
    assert told in shm["text"]
    assert "set UCX_TLS=^posix" in shm["text"]
    assert "/dev/shm must have" in run(2, *DOCTOR, "--quick", **settings).stdout
    job = run(2, *DOCTOR, "--quick", "--json", env={"UCX_TLS": "^posix"}, **settings)
    levels = {f["topic"]: f["level"] for f in json.loads(job.stdout)["findings"]}
    assert levels["/dev/shm"] == "ok"


def test_open_mpi_without_dev_shm(run, mpirun):
    if loads_mpich():
        pytest.skip("MPICH needs a little")
    job = run(2, *DOCTOR, "--quick", "--json", options=limit_shm(mpirun, "4k"))
    levels = {f["topic"]: f["level"] for f in json.loads(job.stdout)["findings"]}
    assert levels["shared memory"] == "ok"
    assert levels["/dev/shm"] == "note"


GPUS_WITHOUT_CUPY = """
import sys
from shardopt.cli import main
import mpi4py
mpi4py.rc.initialize = False
sys.modules["cupy"] = None
import shardopt.cli.doctor.gpus as gpus, shardopt.cli.doctor.job as job
gpus.count_gpus = job.count_gpus = lambda: 4
sys.exit(main(["doctor", "--quick"]))
"""


@pytest.mark.any_mpi
def test_gpus_that_cannot_be_used_are_a_note(run):
    job = run(2, source=GPUS_WITHOUT_CUPY)
    told = " ".join(job.stdout.split())
    assert "note GPUs every rank should be able to use its node's GPUs; got 4 on" in told, (
        job.output
    )
    assert "but not for rank 0. CuPy " in told
    assert "pip install 'shardopt[cuda" in told


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    "way", ["pagemap", pytest.param("compare", marks=pytest.mark.thorough), "magic"]
)
def test_the_way_to_find_written_weights(run, way):
    job = run(1, *DOCTOR, "--quick", "--json", env={"SHARDOPT_WRITE_TRACKING": way})
    content = json.loads(job.stdout)
    (finding,) = [f for f in content["findings"] if f["topic"] == "write tracking"]
    if way == "magic":
        assert finding["level"] == "problem"
        assert "SHARDOPT_WRITE_TRACKING must be one of" in finding["text"]
        assert "got 'magic'" in finding["text"]
        return
    assert content["job"]["nodes"][0]["tracking"] == way
    assert finding["level"] == "note"
    assert "SHARDOPT_WRITE_TRACKING asks for it." in finding["text"]


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
    told = "launcher and MPI library must fit together; got"
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
        ("before the start", "the start of MPI did not end within 1 s. Check "),
        pytest.param(
            "after the start",
            "rank 1 did not reach the search for nodes within 1 s. Check ",
            marks=pytest.mark.any_mpi,
        ),
    ],
)
def test_a_rank_that_does_not_respond_ends_the_job(run, when, told):
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
    assert told.startswith("shardopt doctor: arguments must match --help; got: ")
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
