"""A save is an object with a state, and needs of what it saves no more than ``Sharded`` says."""

import os
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from shardopt.checkpoint.background import PendingSave
from shardopt.checkpoint.format import disk
from shardopt.checkpoint.format.reader import Reader, read_manifest
from shardopt.checkpoint.operation import Committed, SaveOperation, SavePlan, State
from shardopt.core.sharded import Scalars, TensorShard
from shardopt.errors import CheckpointError
from shardopt.layout.partition import ParamSpec
from shardopt.layout.span import Span
from shardopt.layout.state_spec import StateSpec
from shardopt.rule.coefficients import StepCount
from shardopt.trace import OFF

SPEC = ParamSpec("weight", (10,), "float32", 0)
KEYS = ("param", "exp_avg", "exp_avg_sq")


class Alone:
    """Something sharded over one rank, which has never heard of an optimizer."""

    rank, world_size, num_cores = 0, 1, 1

    def __init__(self):
        self.layout = object()
        self.background = []
        self.trace = OFF
        self.memory = {key: np.arange(10, dtype=np.float32) + i for i, key in enumerate(KEYS)}
        self.calls = []

    def tensors(self):
        whole = Span(0, SPEC.numel)
        specs = [StateSpec(key, "float32") for key in KEYS]
        return [TensorShard(0, SPEC, each.key, each, whole, whole, 0, whole) for each in specs]

    def arrays(self, tensors):
        return [self.memory[shard.key][shard.local.slice] for shard in tensors]

    def scalars(self):
        return Scalars([SPEC], [StepCount(4, 0.5)], [{"lr": 0.1}], num_steps=4, loss_scale=2.0)

    def open(self):
        self.calls.append("open")

    def trim(self):
        pass

    def take_over_groups(self, call):
        pass

    def require_whole(self, call):
        pass

    def find_changes(self):
        return {}

    def settle(self, changes):
        self.calls.append("adopt")

    def agree(self, call, description, error=None):
        self.calls.append("agree")
        if error is not None:
            raise error

    def allgather(self, value, call):
        self.calls.append("allgather")
        return [value]


class Jobs:
    """Runs jobs when it is told to."""

    def __init__(self):
        self._waiting = []

    def submit(self, job):
        self._waiting.append((job, future := Future()))
        return future

    def run(self):
        job, future = self._waiting.pop()
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)


def plan_for(path, jobs):
    return SavePlan("save()", 7, path.parent, [path.name], submit=jobs.submit)


def names(path):
    return [each.name for each in path.parent.iterdir()]


def is_locked(folder):
    """Whether the folder would stay when stale ones are removed."""
    long_ago = time.time() - 1000
    os.utime(folder, (long_ago, long_ago))
    return disk.stale_folders(folder.parent) == []


def test_a_save_goes_from_state_to_state(tmp_path):
    path, jobs, sharded = tmp_path / "a", Jobs(), Alone()
    save = SaveOperation(plan_for(path, jobs), sharded, {"x": 1})
    (name,) = names(path)
    assert (save.state, save.is_job_done, save.is_over) == (State.WRITING, False, False)
    jobs.run()
    assert save.is_job_done
    assert is_locked(tmp_path / name)
    save.advance()
    assert (save.state, save.is_job_done) == (State.COMMITTING, False)
    jobs.run()
    assert (names(path), is_locked(path)) == (["a"], True)
    save.advance()
    assert (save.state, save.is_over) == (State.COMMITTED, True)
    assert save.finish() == save.committed == Committed(path, None)
    exchanged = ["agree", "allgather"]
    assert sharded.calls == ["agree", "adopt", "allgather", "open", *exchanged, *exchanged]
    with Reader(path, read_manifest(path)) as reader:
        reader.require_files()
        reader.read(reader.whole_files())
        assert (reader.manifest.step, reader.manifest.num_steps) == (7, 4)
        assert name.endswith(f"a-{reader.manifest.attempt}")
        assert reader.extra() == {"x": 1}
        for key in KEYS:
            np.testing.assert_array_equal(reader.tensor(0, key), sharded.memory[key])


@pytest.mark.parametrize("num_jobs", [0, 1, 2])
def test_a_save_that_is_aborted_leaves_neither_files_nor_a_lock(tmp_path, num_jobs):
    path, jobs = tmp_path / "a", Jobs()
    num_open = len(os.listdir("/proc/self/fd"))
    save = SaveOperation(plan_for(path, jobs), Alone(), None)
    for number in range(num_jobs):
        if number:
            save.advance()
        jobs.run()
    save.abort()
    assert save.state is State.ABORTED
    assert names(path) == (["a"] if num_jobs == 2 else [])  # what is committed stays
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_a_save_that_is_dropped_holds_no_lock(tmp_path):
    path, jobs = tmp_path / "a", Jobs()
    save = SaveOperation(plan_for(path, jobs), Alone(), None)
    jobs.run()
    (name,) = names(path)
    assert is_locked(tmp_path / name)
    del save
    assert not is_locked(tmp_path / name)


@pytest.mark.parametrize("job", ["write_file", "write_manifest"])
def test_a_job_that_fails_aborts_the_save(tmp_path, monkeypatch, job):
    def fail(*args, **options):
        raise OSError(5, "no luck")

    path, sharded = tmp_path / "a", Alone()
    monkeypatch.setattr(disk, job, fail)
    save = SaveOperation(SavePlan("save()", 7, tmp_path, ["a"]), sharded, None)
    with pytest.raises(CheckpointError, match=r"^could not write the checkpoint in .*: no luck\. "):
        save.finish()
    assert (save.state, save.committed, names(path)) == (State.ABORTED, None, [])


@pytest.mark.parametrize("fails", [False, True])
def test_a_pending_save_advances_when_all_ranks_vote_for_it(tmp_path, monkeypatch, fails):
    jobs, sharded, outcomes = Jobs(), Alone(), []
    pending = PendingSave(
        SaveOperation(plan_for(tmp_path / "a", jobs), sharded, None),
        sharded.background,
        lambda *outcome: outcomes.append(outcome),
    )
    assert (sharded.background, pending.vote()) == ([pending], 0)
    if fails:
        monkeypatch.setattr(disk, "write_manifest", lambda *_: Path("/proc/none").mkdir())
    for _ in range(2):
        jobs.run()
        assert pending.vote() == 1
        pending.after_step(0)  # another rank is not done
        assert outcomes == []
        pending.after_step(1)
    ((outcome, awaited),) = outcomes
    assert isinstance(outcome, CheckpointError if fails else Committed)
    assert not awaited
    assert sharded.background == []
    pending.wait()
    assert len(outcomes) == 1
