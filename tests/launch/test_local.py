"""``local.sh``, and the end of a job, which it handles as the other launchers do."""

import os
import re
import signal
import sys

import pytest

from tests.support.launchers import LAUNCH, launch, plain, run, start


def test_every_rank_runs_and_says_where(mpirun, tmp_path):
    job = run(launch("local.sh", "--ranks", "3", "end 0"), tmp_path)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.splitlines()[0].startswith(f"$ {mpirun.program} -n 3 ")
    for rank in range(3):
        assert re.search(rf"^rank {rank} of 3 on \S+ with 3, \d+ threads$", job.stdout, re.M)
        assert f"rank {rank} of 3 ends\n" in job.stdout
    assert "ended with" not in job.stderr  # the scripts keep this to themselves


def test_the_exit_code_is_that_of_the_rank_that_failed(mpirun, tmp_path):
    job = run(launch("local.sh", "--ranks", "2", "end 3"), tmp_path)
    assert job.returncode == 3, job.stdout + job.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ranks_that_are_told_to_end_are_told_once_and_not_hurried(mpirun, tmp_path, number):
    command = launch("local.sh", "--ranks", "2", "wait")
    with start(command, tmp_path) as job:
        job.wait_for("waits", 2)
        job.process.send_signal(number)
        assert job.end() == 128 + number, job.output
    assert job.output.count("saves, told 1 times") == 2, job.output


# -- launchers that misbehave, as a real mpirun does only rarely -----------------------------------


@pytest.fixture
def run_with(tmp_path):
    """Run ``local.sh`` with a launcher that claims to be MPICH's and is scripted by the test."""

    def run_with(body, command):
        launcher = tmp_path / "mpirun"
        launcher.write_text(
            "#!/bin/bash\n"
            'if [[ $1 == --version ]]; then echo "HYDRA build details"; exit; fi\n'
            f"shift 2\n{body}\n"
        )
        launcher.chmod(0o755)
        settings = (f"MPIRUN={launcher}", "JOB_PATIENCE_S=1")
        words = (
            "env",
            *settings,
            "bash",
            LAUNCH / "local.sh",
            "--ranks",
            "2",
            "bash",
            "-c",
            command,
        )
        return run(words, tmp_path)

    return run_with


def test_a_zero_of_mpirun_does_not_count_without_the_ranks(run_with):
    job = run_with('PMI_RANK=0 "$@"', "true")
    assert job.returncode == 1
    assert "no exit code from rank 1, although mpirun ended with 0" in job.stderr


def test_neither_does_it_when_a_rank_failed(run_with):
    job = run_with('PMI_RANK=0 "$@"; PMI_RANK=1 "$@"; exit 0', "exit $((PMI_RANK * 5))")
    assert job.returncode == 5


def test_a_launcher_that_stays_is_killed_when_all_ranks_have_ended(run_with):
    job = run_with('PMI_RANK=0 "$@"; PMI_RANK=1 "$@"; exec sleep 1000', "true")
    assert job.returncode == 0, job.stderr
    assert "mpirun did not end; killing it." in job.stderr


def test_and_when_one_has_failed(run_with):
    job = run_with('PMI_RANK=1 "$@"; trap "" TERM; sleep 1000', "exit 7")
    assert job.returncode == 7
    assert "mpirun did not end; killing it." in job.stderr


def test_what_ranks_print_on_stderr_is_passed_on(run_with):
    job = run_with(
        'PMI_RANK=0 "$@"; PMI_RANK=1 "$@"', r"printf '  indented\n\nhalf a line %s' $PMI_RANK >&2"
    )
    assert job.returncode == 0
    assert job.stderr == "  indented\n\nhalf a line 0\n  indented\n\nhalf a line 1\n"


@pytest.mark.parametrize(("options", "ranks"), [((), 2), (("--ranks", "3"), 3)])
def test_a_rank_for_each_gpu(mpirun, tmp_path, options, ranks):
    show = "echo $SHARDOPT_LOCAL_RANK:$CUDA_VISIBLE_DEVICES"
    words = ("bash", LAUNCH / "local.sh", "--gpus-per-node", "2", *options, "bash", "-c", show)
    path = f"PATH={os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    job = run(plain(path, "CUDA_VISIBLE_DEVICES=4,6,7", *words), tmp_path)
    assert job.returncode == 0, job.stdout + job.stderr
    first, *places = job.stdout.splitlines()
    assert f" -n {ranks} " in first
    assert sorted(places) == ["0:4", "1:6", "2:4"][:ranks]


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--ranks", "0", "true"], "--ranks must be at least 1; got '0'."),
        (["--ranks"], "--ranks must have a value; got none."),
        (["--gpus-per-node"], "--gpus-per-node must have a value; got none."),
        (["--gpus-per-node=0", "true"], "--gpus-per-node must be at least 1; got '0'."),
        ([], "COMMAND must be given; got none."),
        (["--rank", "2", "true"], "options must be listed in --help; got --rank."),
        (["no-such-program"], "COMMAND must begin with a program; got 'no-such-program'."),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, rule):
    path = f"PATH={os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    job = run(["env", path, "bash", LAUNCH / "local.sh", *arguments], tmp_path)
    assert job.returncode == 2
    assert job.stderr.startswith(f"local.sh: {rule}")


def test_an_mpirun_that_is_not_there_is_named(tmp_path):
    job = run(["env", "MPIRUN=/no/mpirun", "bash", LAUNCH / "local.sh", "true"], tmp_path)
    assert job.returncode == 2
    assert job.stderr.startswith("local.sh: MPIRUN must name a program; got '/no/mpirun'.")
