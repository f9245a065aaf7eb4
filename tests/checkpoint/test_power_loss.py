"""Whatever a power loss leaves, what can be loaded is whole, and nothing acknowledged is lost."""

import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from mpi4py import MPI

from shardopt.checkpoint import Checkpointer, save
from shardopt.checkpoint.format import disk, manifest, parsing, reader, requests
from shardopt.checkpoint.format.directory import list_checkpoints
from shardopt.checkpoint.format.manifest import MANIFEST_NAME
from shardopt.errors import CheckpointError
from tests.support.errors import take_step
from tests.support.models import UP_TO_THREE_RANKS
from tests.support.numbered import Origin, build, fill, verify
from tests.support.power_loss import (
    Recorder,
    crash_states,
    materialise,
    merge,
    read_tree,
    replay,
    without,
)
from tests.support.recorder import SYNCS

STEPS = (3, 5, 8)
DIRECTORY = "runs/large"  # neither is there at first
LIMIT = 100  # states tried at one moment
SHM = Path("/dev/shm")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Let small files, too, have several chunks and be written in several pieces."""
    for module in (manifest, parsing, requests, reader, disk):
        monkeypatch.setattr(module, "CHUNK_NBYTES", 4096)
    monkeypatch.setattr(disk, "PIECE_NBYTES", 4096)


# -- what is recorded ------------------------------------------------------------------------------


def save_once(opt, folder, rec):
    fill(opt, Origin(STEPS[0]))
    save(folder / f"step-{STEPS[0]:012d}", opt, extra=Origin(STEPS[0]).extra)
    rec.mark(f"acknowledged {STEPS[0]}")


def save_in_turn(opt, folder, rec):
    checkpointer = Checkpointer(folder, keep_last=1, asynchronous=False)
    for step in STEPS:
        fill(opt, Origin(step))
        checkpointer.save(step, opt, extra=Origin(step).extra)
        rec.mark(f"acknowledged {step}")


def save_beside_training(opt, folder, rec):
    with Checkpointer(folder, keep_last=1) as checkpointer:
        for step in STEPS:
            fill(opt, Origin(step))
            checkpointer.save(step, opt, extra=Origin(step).extra)
            for _ in range(3):  # of which any may commit, or none
                take_step(opt)
            if step != STEPS[1]:  # the next save waits as well
                checkpointer.wait()
                rec.mark(f"acknowledged {step}")


RUNS = {"save": save_once, "in turn": save_in_turn, "beside training": save_beside_training}


def record(comm, root, run, monkeypatch):
    """What all ranks did to the file system, on rank 0; None on the others."""
    rec = Recorder()
    with build(comm) as opt:
        comm.Barrier()
        with monkeypatch.context() as patch:
            patch.setattr(disk, "os", rec)
            patch.setattr(disk, "shutil", rec)
            run(opt, root / DIRECTORY, rec)
    logs = comm.gather(rec.log)
    return None if logs is None else merge(logs)


# -- what must hold --------------------------------------------------------------------------------


class Violation(AssertionError):
    """What may be left must not be."""


class Judge:
    """Looks at what a crash may leave, as someone would who wants to go on from there."""

    def __init__(self, folder):
        self.folder = folder
        self.judged = Counter()  # by number of checkpoints
        self._found = {}

    def judge(self, crash):
        """Every checkpoint must be whole, and none acknowledged be lost but to a newer one."""
        # Names with a dot are those of nothing committed; states that differ in them are alike.
        visible = frozenset(
            item
            for item in crash.state.items()
            if not item[0][len(DIRECTORY) + 1 :].startswith(".")
        )
        if visible not in self._found:
            materialise(crash.state, self.folder)
            self._found[visible] = self._look(self.folder / DIRECTORY)
        found, problem = self._found[visible]
        if problem is not None:
            raise Violation(f"{problem}, after {crash.after}")
        acknowledged = [int(mark.split()[1]) for mark in crash.marks]
        if acknowledged and max(found, default=-1) < max(acknowledged):
            raise Violation(f"{max(acknowledged)} is lost, got {found}, after {crash.after}")
        self.judged[len(found)] += 1

    def _look(self, directory):
        found = []
        for path in directory.iterdir() if directory.exists() else ():
            if path.name.startswith("."):
                continue
            try:
                found.append(verify(path).step)
            except (CheckpointError, AssertionError) as error:
                return found, f"{path.name} is not whole: {error}"
        assert sorted(found) == [folder.step for folder in list_checkpoints(directory)]
        return found, None


@pytest.fixture
def judge():
    """A judge with a folder in memory where there is one: nothing there waits for a disk."""
    with tempfile.TemporaryDirectory(dir=SHM if os.access(SHM, os.W_OK) else None) as folder:
        yield Judge(Path(folder) / "state")


def role_of(op, before):
    """What an fsync is for."""
    name = os.path.basename(op.path)
    if name.endswith(".safetensors"):
        return "files"
    if name.startswith(MANIFEST_NAME):
        return "manifest"
    if name.startswith(disk.UNFINISHED_PREFIX):
        return "folder before commit"
    if name == os.path.basename(DIRECTORY):
        renames = [other.target for other in before if other.kind == "rename"]
        removed = os.path.basename(renames[-1]).startswith(disk.REMOVED_PREFIX)
        return "directory after removal" if removed else "directory after commit"
    return "folders above"


ROLES = ("files", "manifest", "folder before commit", "directory after commit", "folders above")


def fsync_roles(log, root):
    """Each fsync at or below the root, by its number in the log, and what it is for."""
    inside = re.compile(rf"{re.escape(os.path.realpath(root))}(/|$)")
    return {
        id(op): role_of(op, log[:number])
        for number, op in enumerate(log)
        if op.kind in SYNCS and inside.match(op.path)
    }


# -- one rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_one_rank_loses_nothing(tmp_path, monkeypatch, judge, run):
    log = record(MPI.COMM_SELF, tmp_path, run, monkeypatch)
    check_log(log, tmp_path, judge, run)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_each_fsync_is_needed(tmp_path, monkeypatch, judge, run, role):
    log = record(MPI.COMM_SELF, tmp_path, run, monkeypatch)
    check_need(log, tmp_path, judge, role)


@pytest.mark.parametrize("run", [save_in_turn, save_beside_training])
def test_the_fsync_between_taking_a_name_and_removing_files_is_needed(
    tmp_path, monkeypatch, judge, run
):
    log = record(MPI.COMM_SELF, tmp_path, run, monkeypatch)
    check_need(log, tmp_path, judge, "directory after removal")


# -- several ---------------------------------------------------------------------------------------


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_ranks_lose_nothing(comm, mpi_tmp_path, monkeypatch, judge, run):
    log = record(comm, mpi_tmp_path, run, monkeypatch)
    if log is not None:
        check_log(log, mpi_tmp_path, judge, run)


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@pytest.mark.parametrize("role", [*ROLES, "directory after removal"])
def test_ranks_need_each_fsync(comm, mpi_tmp_path, monkeypatch, judge, role):
    log = record(comm, mpi_tmp_path, save_in_turn, monkeypatch)
    if log is not None:
        check_need(log, mpi_tmp_path, judge, role)


@UP_TO_THREE_RANKS
@pytest.mark.mpi(min_size=2)
def test_the_fsync_of_each_ranks_file_is_needed(comm, mpi_tmp_path, monkeypatch, judge):
    log = record(comm, mpi_tmp_path, save_once, monkeypatch)
    for rank in range(comm.size) if log is not None else ():
        less = without(log, lambda op, rank=rank: f"/rank-{rank:05d}-" in op.path)
        assert len(less) == len(log) - 1
        with pytest.raises(Violation):
            judge_all(less, mpi_tmp_path, judge)


def check_log(log, root, judge, run):
    assert replay(log, root) == read_tree(root)
    judge_all(log, root, judge)
    numbers = {0, 1} if run is save_once else {0, 1, 2}
    assert set(judge.judged) == numbers  # of checkpoints that were left: all cases were there
    assert len({op.at for op in log if op.kind == "write"}) > 2  # files are not written at once


def check_need(log, root, judge, role):
    roles = fsync_roles(log, root)
    less = without(log, lambda op: roles.get(id(op)) == role)
    assert len(less) < len(log)
    judge_all(log, root, judge)
    with pytest.raises(Violation):
        judge_all(less, root, judge)


def judge_all(log, root, judge):
    for crash in crash_states(log, root, limit=LIMIT):
        judge.judge(crash)
