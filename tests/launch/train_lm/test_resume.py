"""A run that is interrupted, however, and resumed is the same as one that never was."""

import functools
import shutil
import signal
import subprocess

import numpy as np
import pytest

from tests.conftest import Mpirun
from tests.support.frameworks import environment_for, require
from tests.support.train_jobs import (
    SCRIPT,
    SMALL,
    Started,
    column,
    newest_tensors,
    read_log,
    saved_steps,
    steps_in,
)
from train_lm.plot_loss import plot_loss

LONG = ("--steps", "1000000")
SHORT = ("--steps", "4", "--save-every", "2", "--batch", "3")
TWO = "step-000000000002"


def train(mpirun, text, num_ranks, out, *arguments, returncode=0, **settings):
    """Run to the end on some ranks, with the results in a folder."""
    folders = ("--out", out, "--checkpoint", out / "saved")
    arguments = (SCRIPT, "--text", text, *SMALL, *folders, *arguments)
    job = mpirun(num_ranks, *arguments, timeout_s=180, **settings)
    assert job.returncode == returncode, job.output
    return job


@pytest.fixture
def run(mpirun, tmp_path, text):
    """Run to the end on some ranks, with the results in a folder of this name."""

    def run(num_ranks, name, *arguments, **settings):
        return train(mpirun, text, num_ranks, tmp_path / name, *arguments, **settings)

    return run


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text):
    """Return the results of a run that two ranks never interrupted, in a framework."""

    @functools.cache
    def straight(framework):
        mpirun = Mpirun(tmp_path_factory.mktemp(framework))
        out, env = mpirun.folder / "straight", environment_for(framework, mpirun.folder)
        train(mpirun, text, 2, out, "--framework", framework, *SHORT, env=env)
        return out

    return straight


@pytest.fixture
def start(mpirun, tmp_path, text):
    """Start a run that ends only on a signal."""

    def start(*arguments):
        folders = ("--out", tmp_path / "run", "--checkpoint", tmp_path / "run" / "saved")
        return Started(mpirun, 2, "--text", text, *SMALL, *LONG, *folders, *arguments)

    return start


def leave_after_two(folder, copy):
    """Copy a run as a kill after its second step would leave it, with a log that is longer."""
    (copy / "saved").mkdir(parents=True)
    shutil.copytree(folder / "saved" / TWO, copy / "saved" / TWO)
    shutil.copy(folder / "train.jsonl", copy)
    return copy


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    "framework",  # the others share memory with the optimizer as NumPy does
    ["numpy", pytest.param("jax", marks=pytest.mark.thorough)],
)
def test_on_as_many_ranks_it_is_the_same_run_bit_for_bit(run, tmp_path, straight, framework):
    require(framework)
    whole = straight(framework)
    assert saved_steps(whole / "saved") == [2, 4]
    left = leave_after_two(whole, tmp_path / "left")
    env = environment_for(framework, tmp_path) | {"COLUMNS": "500"}
    job = run(2, "left", "--framework", framework, *SHORT, env=env)
    assert f"Resumed after step 2 from {left / 'saved' / TWO}, saved by 2 ranks." in job.stdout
    assert steps_in(left) == [1, 2, 3, 4]
    for key in ("train_bits", "grad_norm", "lr", "held_out_bits"):
        assert column(left, key) == column(whole, key)
    tensors, expected = newest_tensors(left / "saved"), newest_tensors(whole / "saved")
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=str(name))


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    "num_ranks",  # six sequences: shares of two and of one, and all
    [4, pytest.param(1, marks=pytest.mark.thorough)],
)
def test_on_other_ranks_it_is_the_same_run_but_for_rounding(run, tmp_path, straight, num_ranks):
    whole = straight("numpy")
    left = leave_after_two(whole, tmp_path / "left")
    run(num_ranks, "left", *SHORT)
    assert steps_in(left) == [1, 2, 3, 4]
    for key in ("train_bits", "held_out_bits", "grad_norm"):
        expected = column(whole, key)
        assert column(left, key) == pytest.approx(expected, rel=1e-4)
    starts = [line["num_ranks"] for line in read_log(left) if line["kind"] == "start"]
    assert starts == [2, num_ranks]


@pytest.mark.any_mpi
def test_more_ranks_than_sequences_are_one_sentence(run):
    run(1, "run", "--steps", "1")
    job = run(3, "run", "--steps", "2", returncode=2)
    assert "Traceback" not in job.output
    assert job.stderr.count("train_lm.py: the number of ranks must be at most 2, the seq") == 1


@pytest.mark.any_mpi
def test_a_damaged_checkpoint_is_passed_over(run, tmp_path):
    run(1, "run", "--steps", "2", "--save-every", "1")
    saved = tmp_path / "run" / "saved"
    for path in (saved / TWO).glob("*.safetensors"):
        path.write_bytes(b"")
    job = run(2, "run", "--steps", "3")
    assert "passed over" in job.stderr
    assert steps_in(tmp_path / "run") == [1, 2, 3]
    for path in saved.rglob("*.safetensors"):
        path.write_bytes(b"")
    job = run(2, "run", "--steps", "4", returncode=2)
    assert "Traceback" not in job.output
    assert job.stderr.count("must hold a checkpoint that can be loaded") == 1


@pytest.mark.any_mpi  # tests/cluster kills ranks with every MPI
def test_a_rank_that_is_killed_costs_the_steps_since_the_last_save(start, run, tmp_path):
    out = tmp_path / "run"
    with start("--save-every", "20") as started:
        started.wait_until(lambda: len(saved_steps(out / "saved")) > 1)
        code, output = started.stop(signal.SIGKILL)
        assert code != 0, output
    newest = saved_steps(out / "saved")[-1]
    assert newest % 20 == 0
    job = run(2, "run", "--steps", str(newest + 5), env={"COLUMNS": "500"})
    assert f"Resumed after step {newest} from " in job.stdout
    assert steps_in(out) == list(range(1, newest + 6))
    assert [record["kind"] for record in read_log(out)][-1] == "end"
    plot_loss(out)
    hidden = [path.name for path in (out / "saved").iterdir() if path.name.startswith(".")]
    assert hidden == []  # the save that the kill interrupted


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)]
)
def test_a_signal_to_one_rank_saves_and_ends_all(start, run, tmp_path, number):
    out = tmp_path / "run"
    with start() as started:
        started.wait_until(lambda: len(steps_in(out)) > 5)
        code, output = started.stop(number)
    assert code == 128 + number, output
    last = steps_in(out)[-1]
    assert saved_steps(out / "saved") == [last]
    words = " ".join(output.split())
    assert f"Step {last} is saved in" in words
    run(2, "run", "--steps", str(last + 2))
    assert steps_in(out) == list(range(1, last + 3))


@pytest.mark.any_mpi
def test_sigusr1_to_one_rank_saves_and_the_run_goes_on(start, tmp_path):
    out = tmp_path / "run"
    with start() as started:
        started.wait_until(lambda: len(steps_in(out)) > 5)
        started.kill(signal.SIGUSR1)
        started.wait_until(lambda: saved_steps(out / "saved"))
        (saved,) = saved_steps(out / "saved")
        started.wait_until(lambda: steps_in(out)[-1] > saved + 5)
        code, output = started.stop()
        assert code == 128 + signal.SIGTERM, output
    assert saved_steps(out / "saved") == [saved, steps_in(out)[-1]]


@pytest.mark.any_mpi  # test_train_lm.py interrupts every mpirun; that of Open MPI lets nobody save
def test_an_interrupt_of_mpirun_saves(start, mpirun, tmp_path):
    out = tmp_path / "run"
    with start() as started:
        started.wait_until(lambda: len(steps_in(out)) > 5)
        started.job.send_signal(signal.SIGINT)
        code, output = started.end()
    assert code != 0, output
    if not kills_at_once(mpirun):
        assert saved_steps(out / "saved") == [steps_in(out)[-1]]


def kills_at_once(mpirun):
    """Whether mpirun is Open MPI's, which kills ranks a quarter of a second after an interrupt."""
    version = subprocess.run([mpirun.program, "--version"], capture_output=True, text=True)
    return "Open MPI" in version.stdout
