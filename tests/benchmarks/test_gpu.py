"""The command that needs a GPU, rehearsed without one; and what it says of a machine."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import ROOT
from benchmarks.gpu import facts, losses

RUN = ["bash", str(ROOT / "benchmarks" / "gpu" / "run.sh")]
LIMIT_S = 110
PARTS = ["bits", "ranks2", "gpu_memory"]  # one of each kind, but for
CHECKED = ["racecheck"]  # like bits, under the sanitizer, for which a dry run has nothing


def run(*words, **env):
    environment = os.environ | {"PYTHON": sys.executable} | env
    return subprocess.run(
        [*RUN, *words], env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )


def parts_in(folder):
    return [json.loads(line) for line in (folder / "parts.jsonl").read_text().splitlines()]


@pytest.mark.any_mpi
@pytest.mark.usefixtures("mpirun")
@pytest.mark.parametrize("parts", [PARTS, pytest.param(CHECKED, marks=pytest.mark.thorough)])
def test_a_dry_run(tmp_path, parts):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ("--dry-run", "--quick", "--only", " ".join(parts), "--out", str(tmp_path / "out"))
    done = run(*words, TMPDIR=str(scratch))
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    found = parts_in(tmp_path / "out")
    assert [(part["part"], part["state"]) for part in found] == [(name, "ok") for name in parts]
    assert "All went well" in done.stdout
    assert log.count(" passed") == len({*parts} - {"gpu_memory"})
    if "gpu_memory" in parts:
        measured = json.loads((tmp_path / "out" / "gpu_memory.jsonl").read_text())
        assert measured["settings"] == {"device": "stand-in"}
        assert all(ratio["target"] is None for ratio in measured["ratios"])
    assert not list(scratch.iterdir())  # nothing is left


def test_a_part_that_fails_stops_no_other_and_is_told(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *sys.executable*) echo "$0" ;; *) exit 3 ;; esac\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    words = ("--dry-run", "--only", "bits losses gpu_kernel", "--out", str(out))
    done = run(*words, PYTHON=str(python))
    assert done.returncode == 1
    assert [part["state"] for part in parts_in(out)] == ["failed"] * 3
    assert "3 parts failed: bits losses gpu_kernel" in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["--nonsense"]], ids=str)
def test_its_options(words):
    done = run(*words)
    if words == ["--help"]:
        assert done.returncode == 0
        assert "--dry-run" in done.stdout
        assert "set -u" not in done.stdout
    else:
        assert done.returncode == 2
        assert "there is no option --nonsense" in done.stderr


def test_facts_are_told_even_if_most_cannot_be_found(capsys, monkeypatch):
    for missing in ("cupy", "torch"):
        monkeypatch.setitem(sys.modules, missing, None)
    assert facts.main() == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_name = {fact["fact"]: fact for fact in found}
    assert by_name["host"]["cores"] >= 1
    assert by_name["software"]["numpy"]
    assert by_name["gpu"]["error"].startswith("ModuleNotFoundError")


@pytest.mark.parametrize(("last", "code"), [(7.5, 0), (8.5, 1), (float("nan"), 1)])
def test_a_loss_must_fall(tmp_path, capsys, last, code):
    lines = [{"kind": "start"}, *({"kind": "step", "train_bits": bits} for bits in (8.0, last))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert losses.main(tmp_path) == code
    assert json.loads(capsys.readouterr().out)["has_fallen"] == (code == 0)
