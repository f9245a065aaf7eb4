"""Removing checkpoints, and above all keeping the right ones."""

import os

import numpy as np
import pytest

from tests.support.checkpoints import call, flip, make, refused

FILE = "rank-00000-of-00001.safetensors"
SMALL = {"w": np.ones(3, np.float32)}


def name(step):
    return f"step-{step:012d}"


@pytest.fixture
def run(tmp_path):
    """Four checkpoints, leftovers of a dead job, and folders that prune must not touch."""
    run = tmp_path / "run"
    for step in (1, 2, 3, 4):
        make(run / name(step), SMALL, step=step, num_files=1)
    for leftover in (".unfinished-step-000000000005-ab", ".removed-cd-step-000000000000"):
        (run / leftover).mkdir()
        (run / leftover / FILE).write_bytes(b"x" * 100)
        os.utime(run / leftover, (0, 0))
    make(run / "best", SMALL, num_files=1)
    (run / ".unfinished-step-000000000006-ef").mkdir()  # just now
    return run


def steps(run):
    return [step for step in range(9) if (run / name(step)).exists()]


def others(run):
    return sorted(entry for entry in os.listdir(run) if not entry.startswith("step-"))


def test_dry_run(run, capsys):
    before = sorted(os.listdir(run))
    result = call(capsys, "prune", run, "--keep-last", "3", "--dry-run")
    assert result.code == 0
    assert sorted(os.listdir(run)) == before
    first, *_ = result.stdout.splitlines()
    nbytes = sum(file.stat().st_size for file in (run / name(1)).iterdir())
    assert first == f"would remove {run / name(1)}, {nbytes / 1000:.2f} kB, superseded"
    assert result.stdout.count("left by a dead job") == 2
    assert result.stdout.endswith("would be free; checkpoints that stay: 3\n")


def test_keep_last(run, capsys):
    result = call(capsys, "prune", run, "--keep-last", "2", "--json")
    assert result.code == 0
    assert steps(run) == [3, 4]
    assert others(run) == [".unfinished-step-000000000006-ef", "best"]
    removed = [entry["path"] for entry in result.json["removed"]]
    assert removed[:2] == [str(run / name(1)), str(run / name(2))]
    assert result.json["nbytes"] == sum(entry["nbytes"] for entry in result.json["removed"])
    assert not result.json["dry_run"]
    result = call(capsys, "prune", run, "--keep-last", "2")
    assert (result.code, result.stdout) == (0, "0 B are free now; checkpoints that stay: 2\n")


def test_the_newest_intact_one_stays(run, capsys):
    for step in (3, 4):
        os.truncate(run / name(step) / FILE, 9)
    (run / name(1) / FILE).unlink()
    call(capsys, "prune", run, "--keep-last", "1")
    assert steps(run) == [2, 3, 4]
    (run / name(2) / FILE).unlink()
    call(capsys, "prune", run, "--keep-last", "1")
    assert steps(run) == [2, 3, 4]


def test_what_is_kept_is_read_first(run, capsys):
    flip(run / name(4) / FILE, 4096)
    call(capsys, "prune", run, "--keep-last", "1")
    assert steps(run) == [3, 4]
    call(capsys, "prune", run, "--keep-last", "1", "--quick")
    assert steps(run) == [4]


def test_after(run, capsys):
    result = call(capsys, "prune", run, "--after", "3")
    assert result.code == 0
    assert "after step 3" in result.stdout
    assert steps(run) == [1, 2, 3]
    call(capsys, "prune", run, "--after", "2", "--keep-last", "1")
    assert steps(run) == [2]


def test_after_leaves_something(run, capsys):
    refused(call(capsys, "prune", run, "--after", "0"), "--after must leave")
    (run / name(1) / FILE).unlink()
    refused(call(capsys, "prune", run, "--after", "1"), "--after must leave")
    refused(call(capsys, "prune", run, "--after", "1", "--keep-last", "1"), "--after must leave")
    assert steps(run) == [1, 2, 3, 4]


def test_links_stay(run, capsys):
    (run / name(1)).rename(run.parent / "elsewhere")
    (run / name(1)).symlink_to(run.parent / "elsewhere")
    assert call(capsys, "prune", run, "--keep-last", "1").code == 0
    assert steps(run) == [1, 4]
    assert (run.parent / "elsewhere" / FILE).exists()


def test_refusals(run, capsys, tmp_path):
    refused(call(capsys, "prune", run), "--keep-last or --after", "neither")
    refused(call(capsys, "prune", run, "--keep-last", "0"), "at least 1")
    refused(call(capsys, "prune", run, "--keep-last", "x"), "invalid int value")
    refused(call(capsys, "prune", tmp_path / "no", "--keep-last", "1"), "directory")
    refused(call(capsys, "prune", tmp_path, "--keep-last", "1"), "without any")
