"""The log of a run that is interrupted and resumed: the records that stay."""

import pytest

from train_lm.run_log import FILE_NAME, RunLog, read_log


def write_run(folder, run, steps, begun_at=0):
    log = RunLog(folder)
    log.begin(run, begun_at)
    log.write("start", run=run, step=begun_at)
    for step in steps:
        log.write("step", step=step, train_bits=0.1 * step)
    log.close()


def steps_in(folder):
    return [record["step"] for record in read_log(folder) if record["kind"] == "step"]


def test_what_came_after_the_checkpoint_is_dropped(tmp_path):
    write_run(tmp_path, "a", [1, 2, 3, 4, 5])
    write_run(tmp_path, "a", [4, 5, 6], begun_at=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]
    write_run(tmp_path, "a", [2, 3], begun_at=1)  # as if the job that began at 3 had never run
    kinds = [(record["kind"], record["step"]) for record in read_log(tmp_path)]
    assert kinds == [("start", 0), ("step", 1), ("start", 1), ("step", 2), ("step", 3)]
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_an_end_and_half_a_line_are_dropped(tmp_path):
    write_run(tmp_path, "a", [1, 2])
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"kind": "end", "how": "finished"}\n{"kind": "st')
    write_run(tmp_path, "a", [3], begun_at=2)
    assert steps_in(tmp_path) == [1, 2, 3]
    assert all(record["kind"] != "end" for record in read_log(tmp_path))


@pytest.mark.parametrize("run", ["a", "b"])
def test_a_run_from_its_beginning_keeps_nothing(tmp_path, run):
    write_run(tmp_path, "a", [1, 2])
    write_run(tmp_path, run, [1])
    assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize("content", ["", "no log\n", "{}\n"])
def test_a_log_of_something_else_is_not_gone_on_with(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content)
    write_run(tmp_path, "a", [8], begun_at=7)
    assert steps_in(tmp_path) == [8]


def test_a_log_is_not_touched_before_it_begins(tmp_path):
    write_run(tmp_path, "a", [1, 2])
    RunLog(tmp_path).close()
    assert steps_in(tmp_path) == [1, 2]
