"""Jobs that save as fast as they can are killed at any instant: the next job finds all it may need.

Each kill is of all ranks or of one. Then every checkpoint that is listed must verify, one that was
acknowledged or a newer one be among them, and a job of another number of ranks go on from it.
"""

import contextlib
import os
import random
import select
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from shardopt.checkpoint.format import disk
from shardopt.checkpoint.format.directory import list_checkpoints
from tests.conftest import kill_with_ranks
from tests.support.numbered import hidden, verify_all

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60
LONGEST_DELAY_S = 0.05  # several saves


def job_env():
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


class Saver:
    """A job of saver.py, and what it has told so far.

    Attributes:
        acknowledged: Newest step that is safe, as any rank says.
        went_on_from: Step of the checkpoint that was restored, 0 for none.
        pids: Of the ranks.
    """

    def __init__(self, mpirun, num_ranks, directory, **options):
        self.num_ranks = num_ranks
        self.acknowledged = self.went_on_from = self.num_told = 0
        self.pids = []
        pipe = mpirun.folder / "pipe"
        if not pipe.exists():
            os.mkfifo(pipe)
        self._pipe = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._rest = b""
        options |= {"directory": directory, "pipe": pipe}
        args = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        self._job = mpirun.start(num_ranks, "-m", "tests.support.saver", *args, env=job_env())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Nothing of the job may be left."""
        if self._job.poll() is None:
            kill_with_ranks(self._job)
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.close(self._pipe)

    def await_saves(self, count):
        """Return once all ranks are ready and so many saves are acknowledged."""
        while len(self.pids) < self.num_ranks or self.num_told < count:
            if not self._listen(PATIENCE_S):
                stdout, stderr = kill_with_ranks(self._job)
                pytest.fail(f"the job saves no more; it printed:\n{stdout}{stderr}")

    def listen_for(self, seconds):
        """Take in what the job tells in a time."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self._listen(left):
            pass

    def kill(self, pids):
        """Kill some ranks; return when all processes of the job are gone."""
        family = [psutil.Process(pid) for pid in self.pids]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # ended by mpirun, as another was killed
                os.kill(pid, signal.SIGKILL)
        self.end(family)
        assert self._job.returncode != 0

    def end(self, family=None):
        """Wait for the end of the job."""
        family = family or []
        self._printed = self._job.communicate(timeout=PATIENCE_S)
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
        assert not alive
        self.listen_for(PATIENCE_S)  # the pipe ends with the last rank

    def end_well(self):
        self.end()
        assert self._job.returncode == 0, self._printed

    def _listen(self, timeout_s):
        """Take in what has been told; False if there is nothing in time, nor any more."""
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return False
        data = os.read(self._pipe, 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for kind, *numbers in (line.split() for line in lines):
            if kind == b"ready":
                self.pids.append(int(numbers[0]))
                self.went_on_from = int(numbers[1])
            else:
                self.acknowledged = max(self.acknowledged, int(numbers[0]))
                self.num_told += 1
        return bool(data)


def is_unfinished(name):
    return name.startswith(disk.UNFINISHED_PREFIX)


def is_removed(name):
    return name.startswith(disk.REMOVED_PREFIX)


def kill_often(mpirun, directory, num_kills, seed):
    """A chain of jobs, each killed; returns what there was to see."""
    rng = random.Random(seed)
    seen = Counter()
    newest, keep_last, num_ranks = 0, 2, 0
    for job in range(num_kills):
        num_ranks = rng.choice([n for n in range(1, 5) if n != num_ranks])
        keep_before, keep_last = keep_last, rng.choice([2, 3])
        old = set(hidden(directory)) if directory.exists() else set()
        with Saver(mpirun, num_ranks, directory, job=job, keep_last=keep_last) as saver:
            saver.await_saves(rng.randrange(3 * num_ranks))
            assert saver.went_on_from == newest
            saver.listen_for(rng.uniform(0, LONGEST_DELAY_S))
            victims = saver.pids if rng.random() < 0.5 else [rng.choice(saver.pids)]
            saver.kill(victims)
            acknowledged = max(saver.acknowledged, newest)
        found = list(verify_all(directory))
        newest = max((folder.step for folder, _ in found), default=0)
        assert acknowledged <= newest
        # One may have been committed and the one that it makes superfluous not yet removed.
        assert len(found) <= max(keep_before, keep_last) + 1
        seen["kills"] += 1
        seen["kills of all ranks"] += len(victims) == num_ranks
        seen["checkpoints verified"] += len(found)
        seen["of this job"] += sum(origin.job == job for _, origin in found)
        seen["saved"] += newest - saver.went_on_from
        seen["committed but not acknowledged"] += newest > acknowledged
        new = set(hidden(directory)) - old
        seen["kills that left a folder unfinished"] += any(map(is_unfinished, new))
        seen["kills that left a folder half removed"] += any(map(is_removed, new))
    seen["left unfinished or half removed at last"] = len(hidden(directory))
    return seen


def end_cleanly(mpirun, directory):
    """A last job removes what the killed ones have left, once that is old."""
    newest = max((folder.step for folder in list_checkpoints(directory)), default=0)
    long_ago = time.time() - 1000
    for name in hidden(directory):
        os.utime(directory / name, (long_ago, long_ago))
    with Saver(mpirun, 2, directory, job=10**6, keep_last=3, saves=4) as saver:
        saver.await_saves(8)
        saver.end_well()
        assert saver.went_on_from == newest
    assert hidden(directory) == []
    found = list(verify_all(directory))
    assert [folder.step for folder, _ in found] == [newest + 2, newest + 3, newest + 4]
    assert {origin.job for _, origin in found} == {10**6}


@pytest.fixture
def mpirun(mpirun):
    """Jobs get a /dev/shm of their own where that may be: killed, an MPI leaves its files there."""
    unshare = ("unshare", "--mount", "sh", "-ec")
    mount = "mount -t tmpfs tmpfs /dev/shm"
    if subprocess.run([*unshare, mount], capture_output=True, check=False).returncode == 0:
        program, mpirun.program = mpirun.program, unshare[0]
        mpirun.options = (*unshare[1:], f'{mount}\nexec "$@"', "sh", program)
    return mpirun


@pytest.mark.any_mpi  # files; tests/comm/test_failure.py kills ranks with every MPI
def test_killed_jobs_lose_nothing(mpirun, tmp_path):
    seen = kill_often(mpirun, tmp_path / "run", 4, seed=1)
    assert seen["of this job"] > 0
    end_cleanly(mpirun, tmp_path / "run")


@pytest.mark.long
def test_jobs_killed_two_hundred_times_lose_nothing(mpirun, tmp_path, capsys):
    seen = kill_often(mpirun, tmp_path / "run", 200, seed=2)
    end_cleanly(mpirun, tmp_path / "run")
    with capsys.disabled():
        print("", *(f"{name}: {number}" for name, number in seen.items()), sep="\n")
    assert seen["kills that left a folder unfinished"] > 0
    assert seen["committed but not acknowledged"] > 0


# -- jobs that end with a save under way -----------------------------------------------------------

PRELUDE = """
import sys
from mpi4py import MPI
from shardopt.checkpoint import Checkpointer
from tests.support.numbered import Origin, build, fill

comm = MPI.COMM_WORLD
opt = build(comm)
checkpointer = Checkpointer(sys.argv[1])

def begin(step):
    fill(opt, Origin(step))
    checkpointer.save(step, opt, Origin(step).extra)

begin(1)
checkpointer.wait()
begin(2)
"""


def steps_after(mpirun, directory, ending):
    """How a job ended, and of which steps there are checkpoints then, each of them whole."""
    script = mpirun.folder / "job.py"
    script.write_text(PRELUDE + ending)
    job = mpirun(2, script, directory, env=job_env())
    return job, [origin.step for _, origin in verify_all(directory)]


@pytest.mark.parametrize(
    "ending",
    ["", *(pytest.param(e, marks=pytest.mark.any_mpi) for e in ("opt.step()\n", "sys.exit(0)\n"))],
)
def test_what_nobody_waits_for_is_not_committed_and_holds_nothing_up(mpirun, tmp_path, ending):
    directory = tmp_path / "run"
    job, steps = steps_after(mpirun, directory, ending)
    assert job.returncode == 0, job.output
    assert job.stderr == ""
    # A step may have let rank 0 begin to commit.
    assert steps == [1] or (steps == [1, 2] and "step" in ending)
    assert len(hidden(directory)) == 2 - len(steps)


@pytest.mark.any_mpi
@pytest.mark.parametrize("closed", ["opt", "checkpointer"])
def test_whoever_is_closed_commits_what_is_under_way(mpirun, tmp_path, closed):
    job, steps = steps_after(mpirun, tmp_path / "run", f"{closed}.close()\n")
    assert job.returncode == 0, job.output
    assert steps == [1, 2]
    assert hidden(tmp_path / "run") == []


@pytest.mark.parametrize(
    "block",
    [
        pytest.param("if True", marks=pytest.mark.any_mpi),
        pytest.param("with checkpointer", marks=[pytest.mark.any_mpi, pytest.mark.thorough]),
        "with opt, checkpointer",
    ],
)
def test_a_rank_that_raises_while_a_save_is_under_way_ends_the_job(mpirun, tmp_path, block):
    job, steps = steps_after(
        mpirun,
        tmp_path / "run",
        f"""
{block}:
    if comm.rank == 1:
        raise LookupError("no more text")
    while True:
        opt.step()
""",
    )
    assert job.returncode != 0
    assert "LookupError: no more text" in job.stderr
    assert steps == [1]
