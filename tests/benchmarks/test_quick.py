"""The small versions of all cases: how they are started, told and judged."""

import os
import sys
import time
from dataclasses import replace

import pytest

from benchmarks.__main__ import main
from benchmarks.cases import CASES
from benchmarks.commands import quick
from benchmarks.harness.case import Quick
from benchmarks.harness.jobs import environment, run_ranks

OVERHEAD = replace(
    CASES["overhead"], quick=Quick(("--numel", "64", "--tensors", "2", "--rounds", "1"))
)
UNKNOWN = replace(OVERHEAD, quick=Quick(("--nonsense",)))
SLEEPER = "import os, sys, time; open(sys.argv[1] + str(os.getpid()), 'w'); time.sleep(600)"


@pytest.mark.any_mpi
@pytest.mark.usefixtures("mpirun")
def test_a_case_that_works_and_one_that_does_not(tmp_path, capsys):
    assert quick.run_all([OVERHEAD, CASES["nodes"]], tmp_path) == 0
    out = capsys.readouterr().out
    assert out.startswith("QUICK SIZES ARE NO CLAIMS")
    assert "target <= 1     of the full size" in out
    assert "met" not in out
    assert "nodes: left out, as it needs root" in out
    assert "1 cases in" in out
    assert [path.name for path in tmp_path.iterdir()] == ["overhead.jsonl"]

    assert quick.run_all([UNKNOWN], tmp_path) == 1  # although there is an earlier result
    out = capsys.readouterr().out
    assert "FAILED: exit code 2" in out
    assert "unrecognized arguments: --nonsense" in out
    assert out.endswith("FAILED: overhead\n")


def test_a_case_that_records_nothing_has_failed(tmp_path, capsys):
    silent = replace(OVERHEAD, quick=Quick(("--help",)))
    assert quick.run_all([silent], tmp_path) == 1
    assert "FAILED: it has recorded nothing" in capsys.readouterr().out


def test_a_missing_module_leaves_a_case_out(tmp_path, capsys):
    lacking = replace(OVERHEAD, quick=Quick((), modules=("no_such_module", "sys")))
    assert quick.run_all([lacking], tmp_path) == 0
    assert "left out, as there is no no_such_module\n" in capsys.readouterr().out


@pytest.mark.any_mpi
@pytest.mark.usefixtures("mpirun")
def test_ranks_that_do_not_end_are_ended(tmp_path):
    code, _ = run_ranks(["-c", SLEEPER, f"{tmp_path}/"], 2, timeout_s=3)
    assert code is None
    started = [int(path.name) for path in tmp_path.iterdir()]
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_gets_what_mpi_needs_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    found = environment()
    assert found["OMP_NUM_THREADS"] == "7"
    assert found["NUMBA_NUM_THREADS"] == "2"


def test_wrong_words_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--quick", "kernl"])
    assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_results_go_nowhere_near_the_real_ones():
    assert quick.new_folder().parent.name == "runs"
    assert sys.executable  # the interpreter of the jobs
