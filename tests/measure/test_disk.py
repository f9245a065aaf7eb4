"""Disks are written to as in a save, and nothing is left."""

import os
import signal
import subprocess
import sys

import pytest

from shardopt.checkpoint.format import disk as saving
from shardopt.checkpoint.format.image import PIECE_NBYTES
from shardopt.measure import disk
from shardopt.measure.disk import measure_disk

BLOCKED = """
import os, sys
from pathlib import Path
from shardopt.measure import disk

def write(fd, piece, count):
    os.write(fd, piece)
    print("written", flush=True)
    sys.stdin.read()

disk._write = write
disk.measure_disk(Path(sys.argv[1]), 1)
"""


def test_it_writes_as_a_save_does():
    assert disk.PIECE_NBYTES == PIECE_NBYTES
    assert disk.NUM_WRITERS == saving._NUM_WRITERS


def test_a_rate_is_found_and_nothing_is_left(tmp_path):
    assert measure_disk(tmp_path, 9 << 20) > 0
    assert list(tmp_path.iterdir()) == []


def test_file_systems_without_unnamed_files(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "O_TMPFILE", os.O_RDWR | os.O_DIRECTORY)  # EISDIR, as on NFS
    assert measure_disk(tmp_path, 1) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing(tmp_path):
    words = [sys.executable, "-c", BLOCKED, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
        assert job.stdout.readline() == b"written\n"
        job.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        measure_disk(tmp_path / "none", 1)
