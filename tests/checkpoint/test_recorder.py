"""The stand-in for the module os: it must do what os does, and tell all of it."""

import os
import threading

import pytest

from tests.support.power_loss import Recorder, read_tree, replay

CREATE = os.O_CREAT | os.O_WRONLY | os.O_TRUNC


def test_a_recorder_makes_the_calls_and_logs_those_that_succeed(tmp_path):
    rec = Recorder()
    fd = rec.open(tmp_path / "file", CREATE | os.O_APPEND)
    assert rec.write(fd, b"abc") == 3
    assert rec.write(fd, memoryview(b"def")) == 3
    rec.ftruncate(fd, 5)
    rec.close(fd)
    rec.makedirs(tmp_path / "a" / "b")
    rec.makedirs(tmp_path / "a" / "b", exist_ok=True)
    with pytest.raises(FileExistsError):
        rec.makedirs(tmp_path / "a")
    with pytest.raises(NotImplementedError, match="os.link"):
        rec.link(tmp_path / "file", tmp_path / "other")
    rec.replace(tmp_path / "file", tmp_path / "a" / "file")
    rec.rmdir(tmp_path / "a" / "b")
    kinds = "create truncate write write truncate close mkdir mkdir rename rmdir"
    assert [op.kind for op in rec.log] == kinds.split()
    assert read_tree(tmp_path) == replay(rec.log, tmp_path) == {"a": None, "a/file": b"abcde"}
    assert rec.path is os.path


def test_another_process_may_make_the_same_directory(tmp_path):
    class Os:
        def __getattr__(self, name):
            return getattr(os, name)

        def mkdir(self, path, mode):
            os.mkdir(path)
            os.mkdir(path)

    rec = Recorder(Os())
    rec.makedirs(tmp_path / "a" / "b", exist_ok=True)
    assert read_tree(tmp_path) == {"a": None, "a/b": None}
    assert not rec.log


def test_a_tree_is_removed_as_shutil_does(tmp_path):
    rec = Recorder()
    rec.makedirs(tmp_path / "a" / "b")
    rec.close(rec.open(tmp_path / "a" / "b" / "file", CREATE))
    with pytest.raises(FileNotFoundError):
        rec.rmtree(tmp_path / "none")
    rec.rmtree(tmp_path / "none", ignore_errors=True)
    rec.rmtree(tmp_path / "a")
    assert [op.kind for op in rec.log[-3:]] == ["unlink", "rmdir", "rmdir"]
    assert read_tree(tmp_path) == replay(rec.log, tmp_path) == {}


def test_threads_share_a_recorder(tmp_path):
    rec = Recorder()
    fd = rec.open(tmp_path / "file", CREATE)
    work = [(rec.pwrite, (fd, bytes([i]) * 10, 10 * i)) for i in range(20)]
    work += [(rec.makedirs, (tmp_path / "a" / str(i),)) for i in range(20)]
    threads = [threading.Thread(target=call, args=args) for call, args in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rec.close(fd)
    assert replay(rec.log, tmp_path) == read_tree(tmp_path)
