"""The files of traces: whole, cut off, on a full disk, in a forked child, and off."""

import json
import os
import resource
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import pytest

from shardopt import trace_file
from shardopt.cli.trace.reading import read_events
from shardopt.errors import TraceError, TraceWarning
from shardopt.layout.span import Span
from shardopt.trace import NOTHING, OFF, AnnotatedTrace, FileTrace, open_trace
from shardopt.trace_file import PROCESS, SUFFIX
from tests.support.traces import assert_nested, read, spans


@contextmanager
def file_size_limit(nbytes):
    """Have every write fail that makes a file larger, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def record(trace, number):
    for index in range(number):
        with trace.span("step", step=index), trace.span("update", Span(index, index + 1)):
            pass


def test_a_file_has_what_was_recorded(tmp_path):
    trace = FileTrace(tmp_path / "new" / "folder", 3)
    with trace.span("step", step=7):
        flight = trace.flight("all_gather", Span(0, 5))
        with trace.span("wait", ranks=lambda: [2, 4]):
            pass
        trace.lap("agree", 10_000_001, 12_345_678)
    flight.land()
    trace.close()
    trace.close()
    events = read(trace.path.parent)
    assert {event["pid"] for event in events} == {3}
    wait, lap, step = spans(events)
    assert (wait["name"], wait["args"]) == ("wait", {"ranks": [2, 4]})
    assert (step["name"], step["args"], step["cat"]) == ("step", {"step": 7}, "span")
    assert (lap["ts"], lap["dur"], lap["cat"]) == (10000.001, 2345.677, "phase")
    assert step["ts"] <= wait["ts"] <= wait["ts"] + wait["dur"] <= step["ts"] + step["dur"]
    begin, end = (event for event in events if event["ph"] in "be")
    assert begin["id"] == end["id"]
    assert begin["args"] == {"start": 0, "stop": 5}
    assert step["ts"] <= begin["ts"] <= end["ts"]
    process = next(event["args"] for event in events if event["name"] == PROCESS)
    assert (process["rank"], process["os_pid"]) == (3, os.getpid())


@pytest.mark.parametrize(
    ("name", "title"),
    [("my_loader", "my_loader"), ("pool-3_11", "pool"), ("Thread-7 (work)", "Thread (work)")],
)
def test_a_row_has_the_name_of_its_thread_without_numbers(tmp_path, name, title):
    trace = FileTrace(tmp_path, 0)
    worker = threading.Thread(target=record, args=(trace, 1), name=name)
    worker.start()
    worker.join()
    trace.close()
    titles = {e["args"]["name"] for e in read(tmp_path) if e["name"] == "thread_name"}
    assert title in titles


def test_threads_have_rows_which_later_ones_take_over(tmp_path):
    trace = FileTrace(tmp_path, 0)

    def work(name, barrier):
        with trace.span(name):
            barrier.wait(20)  # both are alive at once

    for name in ("early", "late"):
        barrier = threading.Barrier(2)
        workers = [
            threading.Thread(target=work, args=(name, barrier), name=f"shardopt-file_{index}")
            for index in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    record(trace, 1)
    trace.close()
    events = read(tmp_path)
    rows = {name: {span["tid"] for span in spans(events, name)} for name in ("early", "late")}
    assert len(rows["early"]) == 2
    assert rows["late"] == rows["early"]
    assert not rows["early"] & {span["tid"] for span in spans(events, "step")}
    titles = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {titles[row] for row in rows["early"]} == {"checkpoint writer"}
    assert_nested(events)


def test_a_file_that_is_cut_off_anywhere_can_be_read(tmp_path):
    trace = FileTrace(tmp_path, 0)
    record(trace, 1)
    trace.close()
    content, whole = trace.path.read_bytes(), read(tmp_path)
    cut = tmp_path / "cut"
    numbers = []
    for stop in range(len(content) + 1):
        cut.write_bytes(content[:stop])
        found = list(read_events(cut))
        assert found == whole[: len(found)]
        numbers.append(len(found))
    assert numbers == sorted(numbers)
    assert numbers[-1] == len(whole)


@pytest.mark.parametrize("line", ['{"ph":"X","na', '"text"', "[1]", '{"a": 1}'])
def test_damage_within_a_file_is_an_error(tmp_path, line):
    trace = FileTrace(tmp_path, 0)
    record(trace, 3)
    trace.close()
    lines = trace.path.read_text().splitlines()
    lines[4] = line
    trace.path.write_text("\n".join(lines))
    with pytest.raises(TraceError, match=r"must be a trace .*; got something else in line 5\. "):
        list(read_events(trace.path))


def test_a_batch_is_written_while_the_file_is_open(tmp_path):
    trace = FileTrace(tmp_path, 0)
    record(trace, 500)
    written = len(spans(list(read_events(trace.path))))
    assert 1000 - 256 < written <= 1000
    trace.flush()
    assert len(spans(list(read_events(trace.path)))) == 1000
    trace.close()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "x")
    with pytest.raises(TraceError, match=r"policy.trace must be a folder in which .*; got '.*/x' "):
        open_trace(folder, 0)
    monkeypatch.setenv("SHARDOPT_TRACE", folder)
    with pytest.raises(TraceError, match=r"SHARDOPT_TRACE must be a folder in which .*Not a dir"):
        open_trace(None, 0)


def test_a_disk_that_is_full_from_the_start_is_an_error(tmp_path):
    with (
        file_size_limit(100),
        pytest.raises(TraceError, match=r"policy.trace must .*\(File too large\)\. Choose"),
    ):
        open_trace(str(tmp_path), 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["disk", "size"])
def test_a_trace_that_cannot_go_on_warns_once(tmp_path, how):
    trace = FileTrace(tmp_path, 0, 10_000 if how == "size" else 1 << 30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "disk":
            with file_size_limit(10_000):
                record(trace, 2000)
        else:
            record(trace, 2000)
    (warning,) = caught
    assert warning.category is TraceWarning
    assert "Training goes on without a trace" in str(warning.message)
    assert trace.span("step") is trace.flight("x", Span(0, 1)) is NOTHING
    trace.close()
    assert trace.path.stat().st_size < 60_000
    assert len(spans(list(read_events(trace.path)))) > 20


def test_a_step_does_not_raise_even_if_warnings_are_errors(tmp_path, capsys):
    trace = FileTrace(tmp_path, 0, 10_000)
    record(trace, 2000)  # pytest turns warnings into errors
    trace.close()
    told = capsys.readouterr().err
    assert told.startswith("shardopt: ")
    assert told.count("ends here") == 1


def test_memory_is_bounded_while_writing_takes_long(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_file, "_MAX_KEPT", 1000)
    trace = FileTrace(tmp_path, 0)
    file = trace._file
    with file._lock:  # as if another thread were writing
        record(trace, 505)
        assert len(file._kept) == 1000
    trace.close()
    events = read(tmp_path)
    assert [e["args"] for e in events if e["name"] == "events lost"] == [{"number": 10}]
    assert len(spans(events)) == 1000


FORK = """
import os, sys
from pathlib import Path
from shardopt.trace import FileTrace

trace = FileTrace(Path(sys.argv[1]), 0)
with trace.span("before"):
    pass
child = os.fork()
with trace.span("parent" if child else "child"):
    pass
if child:
    os.waitpid(child, 0)
else:
    trace.flush()
"""  # both end without close()


def test_a_forked_child_leaves_the_file_alone(tmp_path):
    subprocess.run([sys.executable, "-c", FORK, str(tmp_path)], check=True, timeout=60)
    assert [span["name"] for span in spans(read(tmp_path))] == ["before", "parent"]


def test_off_is_one_object_that_does_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv("SHARDOPT_TRACE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert open_trace(None, 0) is OFF
    assert not OFF.is_on
    assert OFF.span("step", step=1) is OFF.flight("all_gather", Span(0, 1)) is NOTHING
    with OFF.span("wait", ranks=lambda: pytest.fail("ranks are not looked up")):
        OFF.lap("agree", 0, 1)
    OFF.flush()
    OFF.close()
    assert not list(tmp_path.iterdir())


def test_the_environment_asks_for_a_trace(monkeypatch, tmp_path):
    monkeypatch.setenv("SHARDOPT_TRACE", str(tmp_path / "env"))
    for given, folder in ((None, "env"), (tmp_path / "given", "given")):
        trace = open_trace(given, 2)
        assert trace.is_on
        trace.close()
        assert [path.name[:9] for path in (tmp_path / folder).iterdir()] == ["rank00002"]
        assert next((tmp_path / folder).iterdir()).name.endswith(SUFFIX)


def test_a_profiler_sees_spans_only_while_it_runs():
    seen, running = [], False

    @contextmanager
    def show(name):
        seen.append(name)
        yield

    trace = AnnotatedTrace(OFF, lambda name: show(name) if running else None)
    assert trace.span("step") is NOTHING
    running = True
    with trace.span("step"), trace.span("update"):
        pass
    assert seen == ["step", "update"]
    assert not trace.is_on


def test_any_value_can_be_shown(tmp_path):
    trace = FileTrace(tmp_path, 0)
    for step in (1.5, "a\n\"'", None, {1}):
        with trace.span("save", step=step):
            pass
    trace.close()
    shown = [span["args"].get("step") for span in spans(json.loads(trace.path.read_text()))]
    assert shown == [1.5, "a\n\"'", None, "{1}"]
