"""Jobs that use one directory at once: each checkpoint is wholly one job's, whoever looks when."""

import fcntl
import os
import time

import pytest

from shardopt.checkpoint import Checkpointer, load, save
from shardopt.checkpoint.format import disk
from shardopt.checkpoint.format.directory import list_checkpoints
from shardopt.errors import CheckpointError, CheckpointWarning, DamagedCheckpointError
from tests.support.errors import take_step, warned
from tests.support.numbered import (
    Origin,
    assert_filled,
    build,
    fill,
    hidden,
    verify,
    verify_all,
)

NUM_SAVES = 5


@pytest.fixture
def job(comm):
    """Which of two jobs this rank is of."""
    return comm.rank % 2


@pytest.fixture
def opt(comm, job):
    """The optimizer of this rank's job."""
    part = comm.Split(job)
    with build(part) as opt:
        yield opt
    part.Free()


def save_often(opt, job, directory, keep_last):
    with Checkpointer(directory, keep_last) as checkpointer:
        for step in range(1, NUM_SAVES + 1):
            fill(opt, Origin(step, job))
            checkpointer.save(step, opt, Origin(step, job).extra)
            for _ in range((step + job) % 3):
                take_step(opt)


@pytest.mark.mpi(min_size=2)
def test_two_jobs_save_the_same_steps(comm, mpi_tmp_path, opt, job):
    save_often(opt, job, mpi_tmp_path / "run", None)
    comm.Barrier()
    if comm.rank == 0:
        found = sorted(origin for _, origin in verify_all(mpi_tmp_path / "run"))
        steps = range(1, NUM_SAVES + 1)
        assert found == [Origin(step, job) for step in steps for job in (0, 1)]
        assert hidden(mpi_tmp_path / "run") == []


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("keep_last", [1, 3])
def test_two_jobs_remove_each_others_checkpoints(comm, mpi_tmp_path, opt, job, keep_last):
    for _ in range(3):
        save_often(opt, job, mpi_tmp_path / "run", keep_last)
    comm.Barrier()
    if comm.rank == 0:
        found = [origin.step for _, origin in verify_all(mpi_tmp_path / "run")]
        # What was saved last is kept, too, though older than what the other job saved before.
        assert keep_last <= len(found) <= 2 * keep_last + 2
        assert found[-1] == NUM_SAVES
        assert hidden(mpi_tmp_path / "run") == []


@pytest.mark.mpi(min_size=2)
def test_one_of_two_jobs_gets_a_path(comm, mpi_tmp_path, opt, job):
    for step in range(1, NUM_SAVES + 1):
        fill(opt, Origin(step, job))
        comm.Barrier()
        error = None
        try:
            save(mpi_tmp_path / str(step), opt, extra=Origin(step, job).extra)
        except CheckpointError as caught:
            error = str(caught)
        outcomes = set(comm.allgather((job, error)))
        ((winner, _),) = [outcome for outcome in outcomes if outcome[1] is None]
        ((_, told),) = [outcome for outcome in outcomes if outcome[1] is not None]
        assert "path must not exist" in told
        assert verify(mpi_tmp_path / str(step)) == Origin(step, winner)
    comm.Barrier()
    assert hidden(mpi_tmp_path) == []


# -- reading meanwhile -----------------------------------------------------------------------------


def while_the_other_job_saves(comm, opt, job, directory, keep_last, read):
    """Let the second job call ``read`` until the first has saved often enough; count its calls."""
    if job == 0:
        fill(opt, Origin(0))
        with Checkpointer(directory, keep_last) as checkpointer:
            checkpointer.save(0, opt, Origin(0).extra)
            checkpointer.wait()
            comm.Barrier()
            for step in range(1, 5 * NUM_SAVES):
                fill(opt, Origin(step))
                checkpointer.save(step, opt, Origin(step).extra)
        if opt.comm.rank == 0:
            comm.isend(None, 1).wait()
        comm.Barrier()
        return
    comm.Barrier()
    count = 0
    while count == 0 or not opt.comm.bcast(opt.comm.rank == 0 and comm.Iprobe(source=0)):
        read()
        count += 1
    if opt.comm.rank == 0:
        comm.recv(source=0)
    comm.Barrier()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("keep_last", [1, 2])
def test_restore_takes_what_has_come_in_place_of_what_was_removed(
    comm, mpi_tmp_path, opt, job, keep_last
):
    checkpointer, before = Checkpointer(mpi_tmp_path / "run"), [0]

    def read():
        restored = checkpointer.restore(opt)
        assert restored is not None
        assert restored.extra == Origin(restored.step).extra
        assert_filled(opt, Origin(restored.step))
        assert restored.step >= before[0]
        before[0] = restored.step

    while_the_other_job_saves(comm, opt, job, mpi_tmp_path / "run", keep_last, read)


@pytest.mark.mpi(min_size=2)
def test_what_is_removed_while_it_is_loaded_is_loaded_or_refused(comm, mpi_tmp_path, opt, job):
    directory = mpi_tmp_path / "run"

    def read():
        names = sorted(path for path in directory.glob("step-*"))
        path = opt.comm.bcast(names[0] if names else directory / "none")
        fill(opt, Origin(10**6))
        try:
            extra = load(path, opt).extra
        except DamagedCheckpointError:
            extra = Origin(10**6).extra  # as it was
        except CheckpointError as error:
            if "does not exist" not in str(error):
                raise
            extra = Origin(10**6).extra
        assert_filled(opt, Origin(**extra))

    while_the_other_job_saves(comm, opt, job, directory, 1, read)


@pytest.mark.mpi
def test_restore_looks_again_when_all_it_knew_of_are_gone(comm, mpi_tmp_path, monkeypatch):
    from shardopt.checkpoint import checkpointer as module

    directory = mpi_tmp_path / "run"
    with build(comm) as opt, Checkpointer(directory, 1) as checkpointer:
        fill(opt, Origin(1))
        checkpointer.save(1, opt, Origin(1).extra)
        checkpointer.wait()
        removed = []

        def load_late(path, target, **options):
            if not removed:
                removed.append(path)
                fill(opt, Origin(2))
                checkpointer.save(2, opt, Origin(2).extra)
                checkpointer.wait()
            return load(path, target, **options)

        monkeypatch.setattr(module, "load", load_late)
        restored = Checkpointer(directory).restore(opt)
        assert restored is not None
        assert restored.step == 2
        assert_filled(opt, Origin(2))
        assert not removed[0].exists()


# -- what is removed -------------------------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize("keep_last", [1, 2])
def test_damaged_newer_checkpoints_do_not_push_out_what_is_saved(comm, mpi_tmp_path, keep_last):
    directory = mpi_tmp_path / "run"
    with build(comm) as opt:
        with Checkpointer(directory, None) as checkpointer:
            for step in (5, 90, 91):
                fill(opt, Origin(step))
                checkpointer.save(step, opt, Origin(step).extra)
        if comm.rank == 0:
            for step in (90, 91):
                for file in (directory / f"step-{step:012d}").glob("rank-*"):
                    file.write_bytes(file.read_bytes()[:-1] + b"x")
        comm.Barrier()
        with Checkpointer(directory, keep_last) as checkpointer:
            with warned(comm, CheckpointWarning, "a newer checkpoint was passed over"):
                assert checkpointer.restore(opt).step == 5
            for step in (6, 7):
                fill(opt, Origin(step))
                checkpointer.save(step, opt, Origin(step).extra)
                checkpointer.wait()
                assert verify(directory / f"step-{step:012d}") == Origin(step)
            with warned(comm, CheckpointWarning, "a newer checkpoint was passed over"):
                assert checkpointer.restore(opt).step == 7


def test_what_is_removed_while_it_is_listed_is_looked_for_again(tmp_path, monkeypatch):
    paths = [tmp_path / f"step-{step:012d}" for step in (1, 2)]
    for path in paths:
        path.mkdir()
        (path / "manifest.json").touch()
    hidden_path = tmp_path / ".unfinished"
    paths[1].rename(hidden_path)

    real = type(tmp_path).iterdir

    def iterdir(self):
        names = list(real(self))
        if hidden_path.exists():
            hidden_path.rename(paths[1])
            paths[0].rename(tmp_path / ".removed")
        return iter(names)

    monkeypatch.setattr(type(tmp_path), "iterdir", iterdir)
    assert [folder.path for folder in list_checkpoints(tmp_path)] == [paths[1]]


def test_a_link_to_nothing_is_no_checkpoint(tmp_path):
    (tmp_path / f"step-{1:012d}").symlink_to("nowhere")
    assert list_checkpoints(tmp_path) == []


LONG_AGO = time.time() - 1000


@pytest.mark.parametrize("prefix", [disk.UNFINISHED_PREFIX, disk.REMOVED_PREFIX])
def test_only_what_is_old_and_nobodys_is_removed(tmp_path, prefix):
    names = ["young", "old", "locked"]
    for name in names:
        (tmp_path / f"{prefix}{name}").mkdir()
        (tmp_path / f"{prefix}{name}" / "file").write_bytes(b"data")
    for name in names[1:]:
        os.utime(tmp_path / f"{prefix}{name}", (LONG_AGO, LONG_AGO))
    lock = disk.FolderLock(tmp_path / f"{prefix}locked")
    disk.remove_stale_folders(tmp_path)
    assert hidden(tmp_path) == [f"{prefix}locked", f"{prefix}young"]
    assert (tmp_path / f"{prefix}locked" / "file").exists()
    lock.release()
    disk.remove_stale_folders(tmp_path)
    assert hidden(tmp_path) == [f"{prefix}young"]


@pytest.mark.mpi
def test_a_save_in_progress_is_locked_by_every_rank(comm, mpi_tmp_path):
    with build(comm) as opt, Checkpointer(mpi_tmp_path) as checkpointer:
        fill(opt, Origin(1))
        checkpointer.save(1, opt, Origin(1).extra)
        comm.Barrier()
        (name,) = hidden(mpi_tmp_path)
        folder = mpi_tmp_path / name
        while not comm.allreduce((folder / _file_of(comm)).exists(), _all()):
            pass
        if comm.rank == 0:
            os.utime(folder, (LONG_AGO, LONG_AGO))
            disk.remove_stale_folders(mpi_tmp_path)
            fd = os.open(folder, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(fd)
        comm.Barrier()
        checkpointer.wait()
        assert verify(mpi_tmp_path / f"step-{1:012d}") == Origin(1)


def _file_of(comm):
    return f"rank-{comm.rank:05d}-of-{comm.size:05d}.safetensors"


def _all():
    from mpi4py import MPI

    return MPI.LAND
