"""Listing and showing checkpoints, also torn and hostile ones."""

import os
import shutil

import numpy as np
import pytest

from shardopt.checkpoint.format.manifest import MANIFEST_NAME
from shardopt.cli import text
from tests.support.checkpoints import alter_manifest, call, make, manifest_of, refused

PARAMS = {
    "weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "half": np.ones(5, np.float16),
    "none": np.zeros((0, 3), np.float32),
}
FILE = "rank-00001-of-00002.safetensors"


@pytest.fixture
def run(tmp_path):
    """Two checkpoints, an unfinished one, and other files."""
    make(tmp_path / "run" / "step-000000000009", PARAMS, step=9)
    make(tmp_path / "run" / "step-000000000010", PARAMS, step=10)
    unfinished = make(tmp_path / "run" / ".unfinished-step-000000000011-ab", PARAMS, step=11)
    (unfinished / MANIFEST_NAME).unlink()
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("none")
    return tmp_path / "run"


def test_ls_lists_the_newest_last(run, capsys):
    result = call(capsys, "ls", run)
    assert result.code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["step", "9", "10", "11"]
    assert [line[-1] for line in lines] == ["state", "complete", "complete", "unfinished"]
    assert lines[1][1:3] == ["2", "29"]
    assert "2025-01-02 03:04:09Z" in result.stdout


def test_ls_as_json(run, capsys):
    found = call(capsys, "ls", "--json", run).json
    assert [entry["step"] for entry in found] == [9, 10, 11]
    assert [entry["world_size"] for entry in found] == [2, 2, None]
    assert found[0]["numel"] == 29
    assert found[0]["num_params"] == 3
    sizes = sum(file.stat().st_size for file in (run / "step-000000000009").iterdir())
    assert found[0]["nbytes"] == sizes


def test_ls_takes_other_names_and_single_checkpoints(run, capsys):
    (run / "step-000000000010").rename(run / "best")
    found = call(capsys, "ls", "--json", run).json
    assert found[1]["path"] == str(run / "best")
    found = call(capsys, "ls", "--json", run / "best", run / "step-000000000009").json
    assert [entry["step"] for entry in found] == [9, 10]


@pytest.mark.parametrize("missing", [MANIFEST_NAME, FILE])
def test_ls_tells_what_is_damaged(run, capsys, missing):
    (run / "step-000000000010" / missing).unlink()
    result = call(capsys, "ls", run)
    assert result.code == 1
    (line,) = [line for line in result.stdout.splitlines() if "damaged: " in line]
    assert missing in line
    assert line.split()[0] == "10"


def test_what_is_not_there_is_refused(run, capsys):
    for command in ("ls", "show", "verify"):
        refused(call(capsys, command, run / "nowhere"), "does not exist")
        refused(call(capsys, command, run / "logs"), "without any")
        refused(call(capsys, command, run / "notes.txt"), "is not a folder")
    refused(call(capsys, "show", run), "one checkpoint", "a directory of 3")


def test_show(run, capsys):
    path = make(run / "a", PARAMS, extra={"seed": 3, "rng": {"state": np.arange(9)}, "t": (1, 2)})
    result = call(capsys, "show", path)
    assert result.code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["weight", "float32", "[4,", "6]", "7"] in lines
    assert ["extra['rng']['state']", "array(int64,", "[9])"] in lines
    assert ["param_groups[0]['betas']", "(0.9,", "0.999)"] in lines
    assert ["step", "7"] in lines
    assert [FILE, *text.nbytes((path / FILE).stat().st_size).split()] in lines


def test_show_as_json(run, capsys):
    extra = {"nan": float("nan"), "array": np.zeros((2, 3)), 5: "x", "flag": True}
    found = call(capsys, "show", "--json", make(run / "a", PARAMS, extra=extra)).json
    assert found["problems"] == []
    assert found["params"][1]["state"] == ["exp_avg", "exp_avg_sq", "master"]
    expected = {"nan": "nan", "array": "array(float64, [2, 3])", "5": "x", "flag": True}
    assert found["extra"] == expected
    assert found["groups"] == [{"lr": 0.1, "betas": [0.9, 0.999]}]


def test_show_what_was_never_committed(run, capsys):
    path = run / ".unfinished-step-000000000011-ab"
    result = call(capsys, "show", path)
    assert result.code == 1
    assert "never committed" in result.stdout
    found = call(capsys, "show", "--json", path).json
    parts = {(tensor["name"], tensor["nbytes"]) for tensor in found["tensors"]}
    assert ("weight", 48) in parts
    assert ("half::master", 8) in parts
    assert [file["name"] for file in found["files"]] == sorted(os.listdir(path))


def test_show_a_torn_one(run, capsys):
    path = run / "step-000000000009"
    (path / MANIFEST_NAME).write_bytes((path / MANIFEST_NAME).read_bytes()[:-1])
    os.truncate(path / FILE, 4100)
    result = call(capsys, "show", path)
    assert result.code == 1
    assert "SHA-256" in result.stdout
    assert f"file {FILE} must have" in result.stdout
    os.truncate(path / FILE, 3)
    assert "header of file" in call(capsys, "show", path).stdout


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        (1 << 40).to_bytes(8, "little"),
        (4).to_bytes(8, "little") + b"[[]]",
        (6).to_bytes(8, "little") + b'{"a":1',
        (20_000).to_bytes(8, "little") + b"[" * 20_000,
        (8).to_bytes(8, "little") + b'{"a":{}}',
        (47).to_bytes(8, "little") + b'{"a":{"dtype":"F32","data_offsets":[9,1]       }}'[:47],
    ],
)
def test_no_header_breaks_show(run, capsys, content):
    path = run / ".unfinished-step-000000000011-ab"
    (path / FILE).write_bytes(content)
    result = call(capsys, "show", path)
    assert result.code == 1
    assert FILE in result.stdout


def test_show_does_not_wait_for_a_pipe(run, capsys):
    path = run / ".unfinished-step-000000000011-ab"
    os.mkfifo(path / "rank-00002-of-00002.safetensors")
    assert "must be a file" in call(capsys, "show", path).stdout


def test_nothing_reaches_the_terminal_that_is_no_text(run, capsys):
    name = "w\x1b[31m\n\udc80é"
    path = make(run / "a", {name: np.ones(3, np.float32)}, extra={"\x07": "\x1b]0;x"})
    alter_manifest(path, created="\x1b[2J", writer={"\x1b": "\x9b"})
    for words in (["show"], ["ls"], ["verify"]):
        printed = call(capsys, *words, path).stdout
        assert all(c == "\n" or c.isprintable() for c in printed)
    assert r"w\x1b[31m\n\udc80é" in call(capsys, "show", path).stdout
    shutil.copytree(path, run / "b")
    alter_manifest(run / "b", loss_scale=2.0)
    assert manifest_of(run / "b").params[0].name == name
    assert call(capsys, "diff", path, run / "b").code == 1
