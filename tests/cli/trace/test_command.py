"""``shardopt trace``: summaries of traces made by hand, merged files, pictures, a killed job."""

import gzip
import json
import signal
import xml.etree.ElementTree as ET

import pytest

from tests.support.checkpoints import call, refused
from tests.support.traces import MadeTrace, assert_nested, spans

STEP_US, NUM_STEPS = 1000, 4


def trace(capsys, *words):
    return call(capsys, *words, command="trace")


def make_rank(folder, rank, *, late_us, steps=NUM_STEPS, **clock):
    """A rank that comes ``late_us`` into each step to the meeting, and updates two buckets.

    All come together 400 us into the step, and the second meeting is 200 us later.
    """
    made = MadeTrace(folder, rank, **clock)
    for number in range(1, steps + 1):
        start = number * 10_000
        first = start + late_us
        made.span("wait", first, start + 400, step=number, ranks=[])
        made.span("consensus", first, start + 400, step=number)
        made.span("agree", start, start + 400, kind="phase")
        made.span("update", start + 410, start + 450, bucket=0, bytes=10)
        made.span("wait", start + 460, start + 520, step=number, ranks=[1 - rank])
        made.span("update", start + 550, start + 590, bucket=1, bytes=10)
        made.span("update", start + 400, start + 600, kind="phase")
        made.span("consensus", start + 600, start + 700, step=number)
        made.span("step", start, start + STEP_US, step=number)
    made.span("save", 90_000, 91_000, step=4)
    made.close()
    return made


@pytest.fixture
def made(tmp_path):
    """Two ranks, the second of which comes late; its clock is an hour behind."""
    born = 1_700_000_000_000_000
    make_rank(tmp_path, 0, late_us=100, born_us=born)
    make_rank(tmp_path, 1, late_us=350, offset_us=3_600_000_000, error_us=20, born_us=born + 50_000)
    return tmp_path


def test_the_summary_adds_up(capsys, made):
    found = trace(capsys, "summary", made, "--json").json
    assert found["num_steps"] == NUM_STEPS - 1  # the first one compiles
    assert found["clock_error_s"] == pytest.approx(20e-6)
    spans_of = {(span["where"], span["name"]): span for span in found["spans"]}
    expected = {
        ("step", "step"): (1000, 1000),
        ("phase", "agree"): (400, 400),
        ("phase", "update"): (200, 200),
        ("in a step", "update"): (80, 80),
        ("in a step", "consensus"): (400, 150),
        ("in a step", "wait"): (360, 110),
    }
    assert spans_of.keys() == expected.keys()
    for place, times_us in expected.items():
        by_rank = {str(rank): us / 1e6 for rank, us in enumerate(times_us)}
        assert spans_of[place]["by_rank_s"] == pytest.approx(by_rank)
        assert spans_of[place]["per_step_s"] == pytest.approx(sum(times_us) / 2e6)


def test_the_summary_names_the_rank_that_others_wait_for(capsys, made):
    found = trace(capsys, "summary", made, "--json").json
    first, second = found["ranks"]
    # The meetings at the end of a step come closer together than the clocks can tell.
    assert (found["num_meetings"], found["num_undecided"]) == (3, 3)
    assert (first["num_last"], second["num_last"]) == (0, 3)
    assert first["waited_for_s"] == pytest.approx(60e-6)  # of messages
    assert second["waited_for_s"] == pytest.approx((60 + 250) * 1e-6)
    text = trace(capsys, "summary", made).stdout
    assert "Rank 1 makes others wait most: 310 us of a step of 1.00 ms." in text
    assert "compared, within 20.0 us" in text
    assert max(map(len, text.splitlines())) <= 100
    for told in ("Saves", "in a step", "3 of 3"):
        assert told in text


def test_a_rank_that_was_killed_is_summarized(capsys, made):
    (path,) = made.glob("rank00001*")
    lines = path.read_text().splitlines(keepends=True)
    ends = [number for number, line in enumerate(lines) if '"name":"step"' in line]
    path.write_text("".join(lines[: ends[2] + 2])[:-9])  # in the middle of a line
    found = trace(capsys, "summary", made, "--json").json
    assert [rank["num_steps"] for rank in found["ranks"]] == [3, 2]
    assert found["num_meetings"] + found["num_undecided"] == 4
    assert found["ranks"][1]["num_last"] == 2


def test_merged_files_have_one_clock(capsys, made, tmp_path):
    for name, load in (("out.json", open), ("out.json.gz", gzip.open)):
        out = tmp_path / name
        assert trace(capsys, "merge", made, "-o", out).code == 0
        with load(out, "rt", encoding="utf-8") as file:
            events = json.load(file)
        assert_nested(events)
        ends = {s["pid"]: [] for s in spans(events)}
        for span in spans(events, "step"):
            ends[span["pid"]].append(span["ts"] + span["dur"])
        assert ends[0] == pytest.approx(ends[1])
        assert ends[0] == pytest.approx([n * 10_000 + STEP_US for n in range(1, NUM_STEPS + 1)])
        refused(trace(capsys, "merge", made, "-o", out), "--out must not exist", "--force")
        assert trace(capsys, "merge", made, "-o", out, "--force").code == 0
    assert not list(tmp_path.glob("*.part"))


def test_the_picture_shows_a_step_of_all_ranks(capsys, made, tmp_path):
    out = tmp_path / "step.svg"
    assert trace(capsys, "picture", made, "-o", out, "--step", 2).code == 0
    root = ET.fromstring(out.read_text(encoding="utf-8"))
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "Step 2 on 2 ranks, 1.00 ms" in texts
    titles = [each.text for each in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sum(title.startswith("update 1, bytes 10") for title in titles) == 2
    assert "prefers-color-scheme: dark" in out.read_text(encoding="utf-8")
    told = "--step must be a step of the trace; got 9. It has 1-4."
    refused(trace(capsys, "picture", made, "-o", out, "--step", 9), told)


def test_runs_of_one_folder_are_told_apart(capsys, made):
    make_rank(made, 0, late_us=0, born_us=1_800_000_000_000_000, steps=2)
    for words, num_steps, ranks in (([], 1, 1), (["--run", "2"], 1, 1), (["--run", "1"], 3, 2)):
        found = trace(capsys, "summary", made, "--json", *words).json
        assert (found["num_steps"], len(found["ranks"])) == (num_steps, ranks)
    refused(trace(capsys, "summary", made, "--run", "3"), "--run must be a number from 1 to 2")


def test_two_jobs_at_once_are_refused(capsys, made):
    (path,) = made.glob("rank00001*")
    other = path.read_text().replace('"os_pid":101', '"os_pid":999')
    path.with_name("rank00001-other-1.trace.json").write_text(other)
    refused(trace(capsys, "summary", made), "must hold one job at a time", "rank 1")


def test_a_folder_without_traces_is_refused(capsys, tmp_path):
    for command in (["summary"], ["merge", "-o", "x"], ["picture", "-o", "x"]):
        refused(trace(capsys, *command, tmp_path), "folder must hold traces; got")
    (tmp_path / "a.trace.json").write_text("hello\nworld\n")
    refused(trace(capsys, "summary", tmp_path), "must be a trace with an event per line")


KILLED = """
import os, signal
import numpy as np
from mpi4py import MPI
from shardopt import NAdam, Parameter

params = [Parameter(np.ones(5000, np.float32))]
opt = NAdam(params)
for step in range(100):
    params[0].grad[...] = 1
    opt.step()
    if step == 60 and MPI.COMM_WORLD.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_job_can_be_looked_at(mpirun, capsys):
    folder = mpirun.folder / "trace"
    job = mpirun(2, source=KILLED, env={"SHARDOPT_TRACE": str(folder)})
    assert job.returncode not in (0, -signal.SIGSEGV), job.output
    found = trace(capsys, "summary", folder, "--json").json
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert all(20 < rank["num_steps"] <= 60 for rank in found["ranks"])
    out = mpirun.folder / "out.json"
    assert trace(capsys, "merge", folder, "-o", out).code == 0
    assert_nested(json.loads(out.read_text(encoding="utf-8")))
