"""The training script as users start it, made small."""

import os
import signal

import pytest

from tests.frameworks import LEND_OVERRIDE, environment_for, require
from tests.launch.runs import SCRIPT, SMALL, Started, read_log


def test_a_short_run_leaves_its_curves_and_its_log(mpirun, tmp_path, text):
    out = tmp_path / "out"
    arguments = ("--steps", "30", "--text", text, "--out", out, *SMALL)
    job = mpirun(2, SCRIPT, *arguments, env={"COLUMNS": "80"})
    assert job.returncode == 0, job.output
    for word in ("2 ranks on 1 node", "replicated NAdam", "bigram counts", "go on"):
        assert word in job.stdout
    log = read_log(out)
    assert [line["step"] for line in log if line["kind"] == "step"] == list(range(1, 31))
    losses = [line["train_bits"] for line in log if line["kind"] == "step"]
    assert losses[-1] < losses[0]
    assert log[-1]["kind"] == "end"
    assert log[-1]["how"] == "finished"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_gives_one_run(mpirun, tmp_path, text):
    runs = []
    for name in ("first", "second"):
        arguments = ("--steps", "5", "--seed", "7", "--text", text, "--out", tmp_path / name)
        assert mpirun(2, SCRIPT, *arguments, *SMALL).returncode == 0
        runs.append([line.get("train_bits") for line in read_log(tmp_path / name)])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("framework", "dtype", "tolerance"),
    [
        ("torch", "float32", 1e-3),
        ("torch", "bfloat16", 2e-2),
        ("jax", "float32", 1e-3),
        ("lucid", "float32", 1e-3),
    ],
)
def test_a_run_in_another_framework_is_the_run_in_numpy(
    mpirun, tmp_path, text, framework, dtype, tolerance
):
    require(framework)
    runs, env = [], environment_for(framework, tmp_path)
    for number, choice in enumerate([(), ("--framework", framework, "--dtype", dtype)]):
        out = tmp_path / str(number)
        arguments = ("--steps", "12", "--text", text, "--out", out, *SMALL, "--batch", "16")
        job = mpirun(2, SCRIPT, *arguments, *choice, timeout_s=180, env=env)
        assert job.returncode == 0, job.output
        runs.append([line for line in read_log(out) if line["kind"] in ("step", "eval")])
    assert f", {dtype}" in job.stdout
    assert (out / "loss.png").exists()
    for key in ("train_bits", "held_out_bits"):
        expected, bits = ([line[key] for line in run if key in line] for run in runs)
        assert bits == pytest.approx(expected, rel=tolerance)
        assert bits[-1] < bits[0]


@pytest.mark.parametrize("framework", ["torch", "jax", "lucid"])
def test_a_framework_that_is_missing_is_one_sentence(mpirun, tmp_path, framework):
    # In front of what may be installed; and typing.override, without which lucid is refused before.
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


@pytest.mark.parametrize("option", [("--text", "/nowhere"), ("--width", "33"), ("--steps", "0")])
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
