"""A disk that fails: every rank raises the same, what was there stays, and later saves work."""

import errno
import fcntl
import itertools
import os
import shutil
import struct
import subprocess
import warnings
from pathlib import Path

import pytest

from shardopt.checkpoint import Checkpointer, save
from shardopt.checkpoint.format import disk
from shardopt.checkpoint.staging import StagedImage
from shardopt.errors import CheckpointError, CheckpointWarning
from tests.support.errors import assert_steps, refused, take_step
from tests.support.models import UP_TO_THREE_RANKS
from tests.support.numbered import Origin, build, fill, hidden, verify, verify_all

ROOT = Path(__file__).parents[2]
CALLS = ("open", "mkdir", "pwrite", "fsync", "rename")
EIO_TEXT = os.strerror(errno.EIO)


@pytest.fixture(scope="module")
def lasting(request):
    """One optimizer for all tests of the file that run on all ranks."""
    from mpi4py import MPI

    with build(MPI.COMM_WORLD) as opt:
        yield opt


@pytest.fixture
def opt(lasting):
    """An optimizer that must still step after the test."""
    yield lasting
    assert_steps(lasting)


# -- ways to save, each of which returns once that is safe -----------------------------------------


class Saver:
    """``save`` itself."""

    def __init__(self, opt, directory):
        self.opt = opt
        self.directory = directory

    def __call__(self, step):
        fill(self.opt, Origin(step))
        self.save(step, Origin(step).extra)

    def save(self, step, extra):
        save(self.directory / f"step-{step:012d}", self.opt, extra=extra)


class InTurn(Saver):
    """A Checkpointer that lets training wait."""

    asynchronous = False

    def __init__(self, opt, directory):
        super().__init__(opt, directory)
        self.checkpointer = Checkpointer(directory, None, self.asynchronous)

    def save(self, step, extra):
        self.checkpointer.save(step, self.opt, extra)


class Waited(InTurn):
    """One whose save ``wait`` drives."""

    asynchronous = True

    def save(self, step, extra):
        self.checkpointer.save(step, self.opt, extra)
        self.checkpointer.wait()


class Stepped(InTurn):
    """One whose save steps drive: they warn of what ``wait`` then raises."""

    asynchronous = True

    def save(self, step, extra):
        self.checkpointer.save(step, self.opt, extra)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            while self.opt.core.background:
                take_step(self.opt)
        texts = [str(warning.message) for warning in seen]
        try:
            self.checkpointer.wait()
        except CheckpointError as error:
            told = f"a checkpoint could not be saved, as wait() will say, too: {error}"
            assert texts == [told] * (self.opt.comm.rank == 0)
            assert all(warning.category is CheckpointWarning for warning in seen)
            self.checkpointer.wait()  # says it once
            raise
        assert texts == []


WAYS = [Saver, InTurn, Waited, Stepped]


def fails(comm, saver, step, *told, alone=None):
    """Whether a save raises; if so it must raise the same on every rank.

    ``alone`` is as for ``refused``; None where any of the ranks may be the one that failed.
    """
    error = None
    try:
        saver(step)
    except CheckpointError as caught:
        error = caught
    outcomes = comm.allgather(None if error is None else str(error))
    assert len(set(outcomes)) == 1, outcomes
    if error is not None:
        if alone is None:
            alone = str(error).startswith(f"rank {comm.size - 1}: ")
        with refused(comm, type(error), *told, alone=alone):
            raise error
    return error is not None


def assert_there(comm, directory, *steps):
    """On rank 0: these checkpoints and nothing else. Collective."""
    comm.Barrier()
    if comm.rank == 0:
        assert [origin.step for _, origin in verify_all(directory)] == list(steps)
        assert [path.name for path in sorted(directory.iterdir())] == [
            f"step-{step:012d}" for step in steps
        ]
    comm.Barrier()


# -- one rank's call fails -------------------------------------------------------------------------


class Faulty:
    """Stands in for the module ``os``: before one of the calls that change things, another thing.

    Attributes:
        happened: Whether it came to that.
    """

    def __init__(self, number, event):
        self.happened = False
        self._left = number
        self._event = event

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args, **kwargs):
            self._left -= 1
            if self._left == -1:
                self.happened = True
                self._event()
            return real(*args, **kwargs)

        return call


def sweep(comm, culprit, monkeypatch, event, attempt):
    """Let the first call of one rank go wrong, then the second, until a save makes no more of them.

    Gives what ``attempt`` gave, and whether it has come to the event.
    """
    for number in itertools.count():
        faulty = Faulty(number, event)
        with monkeypatch.context() as patch:
            if comm.rank == culprit:
                patch.setattr(disk, "os", faulty)
            outcome = attempt()
        happened = comm.bcast(faulty.happened, culprit)
        yield outcome, happened
        if not happened:
            # make the folder, lock it, open, write and sync the file, sync the folder
            assert number >= (6 if culprit == 0 else 4)
            return


def fail():
    raise OSError(errno.EIO, EIO_TEXT)


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@pytest.mark.parametrize("first", [True, False], ids=["first rank", "last rank"])
@pytest.mark.parametrize("way", [Saver, Stepped])
def test_whatever_call_fails_nothing_has_changed(comm, opt, mpi_tmp_path, monkeypatch, way, first):
    directory, culprit = mpi_tmp_path / "run", 0 if first else comm.size - 1
    saver = way(opt, directory)
    saver(1)

    def attempt():
        return fails(comm, saver, 2, EIO_TEXT, alone=culprit == comm.size - 1)

    for failed, happened in sweep(comm, culprit, monkeypatch, fail, attempt):
        assert failed == happened
        assert_there(comm, directory, *([1] if failed else [1, 2]))
    saver(3)
    assert_there(comm, directory, 1, 2, 3)


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("way", "first"),
    [
        pytest.param(Saver, True, id="saver, first rank"),
        pytest.param(Stepped, False, id="stepped, last rank"),
        pytest.param(Saver, False, id="saver, last rank", marks=pytest.mark.thorough),
        pytest.param(Stepped, True, id="stepped, first rank", marks=pytest.mark.thorough),
    ],
)
def test_the_directory_may_vanish_while_it_is_written_to(
    comm, opt, mpi_tmp_path, monkeypatch, way, first
):
    directory, culprit = mpi_tmp_path / "run", 0 if first else comm.size - 1
    number, num_failed = itertools.count(), 0
    saver = way(opt, directory)
    saver(1)

    def vanish():
        directory.rename(mpi_tmp_path / f"gone-{next(number)}")

    def attempt():
        return fails(comm, saver, 2)

    for failed, happened in sweep(comm, culprit, monkeypatch, vanish, attempt):
        assert happened or not failed  # what vanishes once all is done is not missed
        num_failed += failed
        if failed:
            saver(2)
            assert_there(comm, directory, 2)
        comm.Barrier()
        if comm.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
        comm.Barrier()
        saver(1)
    assert num_failed >= 2


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS)
def test_the_directory_may_vanish_between_saves(comm, opt, mpi_tmp_path, way):
    directory = mpi_tmp_path / "run"
    saver = way(opt, directory)
    saver(1)
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(directory)
    comm.Barrier()
    saver(2)
    assert_there(comm, directory, 2)


@UP_TO_THREE_RANKS
@pytest.mark.mpi
def test_the_next_save_raises_what_became_of_the_one_before(comm, opt, mpi_tmp_path, monkeypatch):
    checkpointer = Checkpointer(mpi_tmp_path / "run")
    fill(opt, Origin(1))
    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_file", lambda *_, **__: fail())
        checkpointer.save(1, opt, Origin(1).extra)
        with pytest.raises(CheckpointError, match=EIO_TEXT):
            checkpointer.wait()
        checkpointer.save(1, opt, Origin(1).extra)
        with refused(comm, CheckpointError, EIO_TEXT):
            checkpointer.save(2, opt, Origin(2).extra)
    checkpointer.save(1, opt, Origin(1).extra)
    checkpointer.wait()
    assert_there(comm, mpi_tmp_path / "run", 1)


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@pytest.mark.parametrize("way", [Waited, Stepped])
def test_too_little_memory_for_the_copy_is_an_error_of_the_save(
    comm, opt, mpi_tmp_path, monkeypatch, way
):
    directory, last = mpi_tmp_path / "run", comm.rank == comm.size - 1

    def copy(self, *args):
        raise MemoryError("no memory for a copy")

    saver = way(opt, directory)
    saver(1)
    with monkeypatch.context() as patch:
        if last:
            patch.setattr(StagedImage, "copy", copy)
        assert fails(comm, saver, 2, "no memory for a copy", alone=True)
    assert_there(comm, directory, 1)
    saver(2)
    assert_there(comm, directory, 1, 2)


# -- something is in the way -----------------------------------------------------------------------


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS)
def test_a_directory_that_is_a_file_is_refused(comm, opt, mpi_tmp_path, way):
    if comm.rank == 0:
        (mpi_tmp_path / "file").write_bytes(b"text")
    comm.Barrier()
    for directory in (mpi_tmp_path / "file", mpi_tmp_path / "file" / "below"):
        assert fails(comm, way(opt, directory), 1, "Not a directory", alone=comm.size == 1)
    assert (mpi_tmp_path / "file").read_bytes() == b"text"


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@pytest.mark.parametrize("what", ["file", "folder", "checkpoint", "link to nothing"])
def test_what_has_the_name_already_stays(comm, opt, mpi_tmp_path, what):
    path = mpi_tmp_path / f"step-{1:012d}"
    saver = Saver(opt, mpi_tmp_path)
    if what == "checkpoint":
        saver(1)
    elif comm.rank == 0:
        if what == "file":
            path.write_bytes(b"text")
        elif what == "folder":
            path.mkdir()
            (path / "notes").write_bytes(b"text")
        else:
            path.symlink_to("nowhere")
    comm.Barrier()
    before = sorted(path.iterdir()) if path.is_dir() else path.lstat().st_ino
    assert fails(comm, saver, 1, "path must not exist", alone=comm.size == 1)
    assert (sorted(path.iterdir()) if path.is_dir() else path.lstat().st_ino) == before
    assert hidden(mpi_tmp_path) == []
    comm.Barrier()
    checkpointer = Checkpointer(mpi_tmp_path)
    fill(opt, Origin(1))
    checkpointer.save(1, opt, Origin(1).extra)
    checkpointer.wait()
    assert verify(path.with_name(f"{path.name}.1")) == Origin(1)


SHUT_DOWN = 0x8004587D  # FS_IOC_SHUTDOWN: the file system forgets what is not on the disk yet


def shut_down(folder):
    """Let a file system fail from now on, as if its power had gone."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, SHUT_DOWN, struct.pack("I", 2))  # without writing its journal
    finally:
        os.close(fd)


# -- real file systems, each in a mount namespace of a job's own -----------------------------------

PRELUDE = """
import os, subprocess, sys
from pathlib import Path
from mpi4py import MPI
from tests.support.numbered import *
from tests.checkpoint.test_disk_faults import *

comm = MPI.COMM_WORLD
disk_folder = Path(sys.argv[1])
opt = build(comm)

def on_rank_0(function, *args):
    comm.Barrier()
    if comm.rank == 0:
        function(*args)
    comm.Barrier()

def run(*command):
    subprocess.run(command, check=True)
"""


@pytest.fixture
def run_on(mpirun, tmp_path):
    """Run a script on a file system that a shell command mounts at ``$1``."""

    def run(num_ranks, mount, body):
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        unshare = ("unshare", "--mount", "sh", "-ec")
        probe = subprocess.run([*unshare, mount, "sh", folder], capture_output=True, text=True)
        if probe.returncode != 0:
            pytest.skip(f"may not mount a file system: {probe.stderr.strip()}")
        program, mpirun.program = mpirun.program, unshare[0]
        options = (*unshare[1:], f'{mount}\nshift\nexec "$@"', "sh", str(folder), program)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        script = tmp_path / "on_disk.py"
        script.write_text(f"{PRELUDE}\n{body}\nprint('well', flush=True)\n")
        job = mpirun(num_ranks, script, folder, env={"PYTHONPATH": path}, options=options)
        assert job.returncode == 0, job.output
        assert job.stdout.count("well") == num_ranks, job.output

    return run


REFUSING = """
for way in WAYS:
    directory = disk_folder / way.__name__
    saver = way(opt, directory)
    saver(1)
    on_rank_0(break_it)
    for _ in range(2):
        assert fails(comm, saver, 2, os.strerror(errno.{code})), way
        assert_steps(opt)
        assert_there(comm, directory, 1)
    on_rank_0(mend_it)
    saver(2)
    assert_there(comm, directory, 1, 2)
    on_rank_0(shutil.rmtree, directory)
"""


@pytest.mark.any_mpi
def test_a_full_disk_is_refused(run_on):
    run_on(
        2,
        "mount -t tmpfs -o size=1m tmpfs $1",
        """
def break_it():
    with open(disk_folder / "ballast", "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with open(disk_folder / "ballast", "r+b") as file:  # the files do not fit, what is above does
        file.truncate(file.seek(0, 2) - 12288)

def mend_it():
    os.unlink(disk_folder / "ballast")
"""
        + "from contextlib import suppress\n"
        + REFUSING.format(code="ENOSPC"),
    )


@pytest.mark.any_mpi
def test_a_disk_that_may_only_be_read_is_refused(run_on):
    run_on(
        2,
        "mount -t tmpfs tmpfs $1",
        """
def break_it():
    run("mount", "-o", "remount,ro", str(disk_folder))

def mend_it():
    run("mount", "-o", "remount,rw", str(disk_folder))
"""
        + REFUSING.format(code="EROFS"),
    )


@pytest.mark.any_mpi
def test_a_directory_above_that_knows_no_fsync_is_no_obstacle(run_on):
    run_on(
        2,
        "mount -t tmpfs tmpfs /sys/kernel && mkdir /sys/kernel/runs",
        """
directory = Path("/sys/kernel/runs")
with pytest.raises(OSError, match="Invalid argument"):
    os.fsync(os.open("/sys", os.O_RDONLY))
for way in WAYS:
    way(opt, directory)(1)
    assert_there(comm, directory, 1)
    on_rank_0(shutil.rmtree, directory)
""",
    )


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    "make", ["mkfs.ext4 -q", pytest.param("mkfs.xfs -q", marks=pytest.mark.thorough)]
)
def test_a_file_system_that_breaks_down_is_refused_and_keeps_what_was_safe(run_on, make):
    run_on(
        2,
        f"""
mount -t tmpfs tmpfs $1
truncate -s 320m $1/image
{make} $1/image
mkdir $1/tree
mount -o loop $1/image $1/tree
""",
        """
tree = disk_folder / "tree"

def mend_it():
    run("umount", str(tree))
    run("mount", "-o", "loop", str(disk_folder / "image"), str(tree))

for way in WAYS:
    directory = tree / way.__name__ / "new"
    saver = way(opt, directory)
    saver(1)
    on_rank_0(shut_down, tree)
    for _ in range(2):
        assert fails(comm, saver, 2, os.strerror(errno.EIO)), way
        assert_steps(opt)
    on_rank_0(mend_it)
    assert_there(comm, directory, 1)
    saver(2)
    on_rank_0(shut_down, tree)
    on_rank_0(mend_it)
    assert_there(comm, directory, 1, 2)
""",
    )
