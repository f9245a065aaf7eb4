"""The training script as users start it, with a small model."""

import os
import signal
import sys

import pytest

from tests.conftest import Mpirun
from tests.support.frameworks import LEND_OVERRIDE, environment_for, require
from tests.support.launchers import LAUNCH, run
from tests.support.train_jobs import SCRIPT, SMALL, Started, column, read_log


def run_briefly(mpirun, text, *choice, **settings):
    """Take a few steps; returns the job and the losses in its log."""
    out = mpirun.folder / "out"
    arguments = ("--steps", "4", "--seed", "7", "--text", text, "--out", out, *SMALL)
    job = mpirun(2, SCRIPT, *arguments, "--batch", "16", *choice, timeout_s=180, **settings)
    assert job.returncode == 0, job.output
    assert (out / "loss.png").exists()
    return job, {key: column(out, key) for key in ("train_bits", "held_out_bits")}


@pytest.fixture(scope="module")
def numpy_run(tmp_path_factory, text):
    """A short run in NumPy: its folder, its job and its losses."""
    mpirun = Mpirun(tmp_path_factory.mktemp("numpy"))
    return mpirun.folder / "out", *run_briefly(mpirun, text, env={"COLUMNS": "80"})


@pytest.fixture
def expected(numpy_run):
    return numpy_run[2]


@pytest.mark.mpirun
@pytest.mark.any_mpi
def test_a_short_run_leaves_its_curves_and_its_log(numpy_run):
    out, job, _ = numpy_run
    for word in ("2 ranks on 1 node", "replicated NAdam", "bigram counts", "continue"):
        assert word in job.stdout
    log = read_log(out)
    assert [line["step"] for line in log if line["kind"] == "step"] == list(range(1, 5))
    losses = [line["train_bits"] for line in log if line["kind"] == "step"]
    assert losses[-1] < losses[0]
    assert log[-1]["kind"] == "end"
    assert log[-1]["how"] == "finished"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough  # train_lm/test_resume.py compares two runs of one seed, too
@pytest.mark.any_mpi
def test_one_seed_gives_one_run(mpirun, text, expected):
    _, bits = run_briefly(mpirun, text)
    assert bits == expected


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    ("framework", "dtype", "tolerance"),
    [
        # models/test_frameworks.py compares the losses of all models in float32
        pytest.param("torch", "float32", 1e-3, marks=pytest.mark.thorough),
        ("torch", "bfloat16", 2e-2),
        ("jax", "float32", 1e-3),
        ("lucid", "float32", 1e-3),
    ],
)
def test_a_run_in_another_framework_is_the_run_in_numpy(
    mpirun, tmp_path, text, expected, framework, dtype, tolerance
):
    require(framework)
    choice = ("--framework", framework, "--dtype", dtype)
    job, found = run_briefly(mpirun, text, *choice, env=environment_for(framework, tmp_path))
    assert f", {dtype}" in job.stdout
    for key, bits in found.items():
        assert bits == pytest.approx(expected[key], rel=tolerance)
        assert bits[-1] < bits[0]


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    "framework", ["torch", *(pytest.param(f, marks=pytest.mark.thorough) for f in ("jax", "lucid"))]
)
def test_a_framework_that_is_missing_is_one_sentence(mpirun, tmp_path, framework):
    # Hides what may be installed. Without typing.override lucid would be refused earlier.
    (tmp_path / f"{framework}.py").write_text(
        f"""raise ModuleNotFoundError("No module named '{framework}'")"""
    )
    (tmp_path / "sitecustomize.py").write_text(LEND_OVERRIDE)
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    job = mpirun(2, SCRIPT, "--framework", framework, env={"PYTHONPATH": path})
    assert job.returncode == 2
    assert "Traceback" not in job.output
    sentence = (
        f"train_lm.py: --framework {framework} must be installed; got: No module named "
        f"'{framework}'. Install it: pip install '.[{framework}]'."
    )
    assert job.stderr.splitlines().count(sentence) == 1


@pytest.mark.any_mpi
def test_a_gpu_that_is_missing_is_one_sentence(mpirun):
    require("torch")
    words = ("--framework", "torch", "--device", "cuda")
    job = mpirun(2, SCRIPT, *words, env={"CUDA_VISIBLE_DEVICES": ""})
    assert job.returncode == 2
    assert "Traceback" not in job.output
    (told,) = [line for line in job.stderr.splitlines() if line.startswith("train_lm.py: ")]
    assert told.startswith("train_lm.py: --device cuda must find a GPU; got none (CUDA of torch ")
    assert told.endswith("Check nvidia-smi and CUDA_VISIBLE_DEVICES, or leave --device out.")


@pytest.mark.parametrize("how", [[SCRIPT], ["-m", "mpi4py", SCRIPT], ["-m", "train_lm"]])
def test_every_way_to_start_the_script_finds_its_modules(how):
    job = run([sys.executable, *how, "--help"], LAUNCH)
    assert job.returncode == 0, job.stderr
    assert job.stdout.startswith("usage: train_lm.py ")


def test_the_command_line_is_checked_without_any_package(tmp_path):
    """``quickstart.sh`` does so before it installs them."""
    options = LAUNCH / "train_lm" / "options.py"
    job = run([sys.executable, "-I", "-S", options, "--framework", "torch", "--out", "x"], tmp_path)
    assert (job.returncode, job.stdout) == (0, "torch x\n")


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    "option",
    [
        ("--text", "/nowhere"),
        pytest.param(("--width", "33"), marks=pytest.mark.thorough),
        pytest.param(("--steps", "0"), marks=pytest.mark.thorough),
    ],
)
def test_a_wrong_option_is_one_sentence(mpirun, tmp_path, option):
    job = mpirun(2, SCRIPT, "--out", tmp_path / "out", *option)
    assert job.returncode != 0
    assert " must " in job.stderr
    assert "Traceback" not in job.output


def test_an_interrupt_ends_all_ranks_and_keeps_the_log(mpirun, tmp_path, text):
    out = tmp_path / "out"
    arguments = ("--steps", "100000", "--text", text, "--out", out, *SMALL)
    with Started(mpirun, 2, *arguments) as started:
        started.wait_until(lambda: len(read_log(out)) >= 20)
        started.job.send_signal(signal.SIGINT)
        code, output = started.end()
    assert code != 0, output
    assert len(read_log(out)) >= 20
