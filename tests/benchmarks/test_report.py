"""Reports from the results in the repository, which must stay readable."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

from benchmarks import FOLDER, RESULTS_FOLDER
from benchmarks.__main__ import main
from benchmarks.cases import CASES
from benchmarks.cases.step import LIMIT
from benchmarks.cases.training import TRAINERS, tokens_per_s
from benchmarks.harness.record import append, newest, read
from benchmarks.harness.result import Result
from benchmarks.report import tables
from tests.support.errors import FORM

LINES = [
    json.loads(line)
    for path in sorted(RESULTS_FOLDER.glob("*.jsonl"))
    for line in path.read_text().splitlines()
]
RENAMED = ("shardopt: distance from", "shardopt: from")  # since the first lines of memory
IDS = [f"{number}: {line['benchmark']} of {line['date']}" for number, line in enumerate(LINES)]


@pytest.mark.parametrize("line", LINES, ids=IDS)
def test_ratios_of_recorded_samples_are_those_recorded(line):
    case = CASES[line["benchmark"]]
    judged = {verdict.name: verdict for verdict in case.judge(Result.from_json(line))}
    recorded = {ratio["name"].replace(*RENAMED): ratio for ratio in line["ratios"]}
    assert recorded.keys() <= judged.keys()
    for name, ratio in recorded.items():
        assert judged[name].value == pytest.approx(ratio["value"], rel=1e-5)
        assert (judged[name].target is None) == (ratio["target"] is None)


def test_a_result_is_read_as_it_was_written(tmp_path):
    for line in LINES:
        append(CASES[line["benchmark"]], Result.from_json(line), tmp_path)
    for name, case in CASES.items():
        old, new = read(case, RESULTS_FOLDER), read(case, tmp_path)
        assert new == old
        if not old:
            continue  # not every machine has a GPU
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [len(line["ratios"]) for line in lines] == [len(case.judge(each)) for each in new]


def test_a_quiet_result_counts_more_than_a_newer_one():
    line = next(line for line in LINES if line["benchmark"] == "step")
    dates = ("2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00", "2026-01-03T00:00:00+00:00")
    made = [
        Result.from_json(line | {"date": date, "others": others})
        for date, others in zip(dates, (0.0, 0.01, 0.5), strict=True)
    ]
    assert newest(made) == [made[1]]
    assert newest(made[2:]) == [made[2]]


def test_the_plot_is_drawn_from_the_results(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plots" / "step_time.svg"
    main(["plot", "--to", str(path), "--png"])
    assert capsys.readouterr().out.split() == [str(path), str(path.with_suffix(".png"))]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    root = ET.parse(path).getroot()
    assert root.tag.endswith("}svg")
    words = " ".join("".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text"))
    shown = [result for result in tables.read_figures(RESULTS_FOLDER).steps
             if result.origin.mpi.startswith("MPICH")]  # fmt: skip
    assert shown
    for result in shown:
        assert f"{result.ranks} ranks" in words
        assert f"limit of memory: {result.value(LIMIT):.2f} ns" in words
        for name in tables.CONTENDERS:
            assert f"{tables.nanoseconds(result, name):.2f} ns" in words


def test_the_loss_is_drawn_over_the_seconds_of_training(tmp_path):
    plot = pytest.importorskip("benchmarks.report.plot")
    result = tables.read_figures(RESULTS_FOLDER).training[0]
    for name in TRAINERS:
        seconds, bits = plot.learning_curve(result, name)
        assert len(seconds) == len(bits) == len(result.samples_s[name]) + 1
        assert seconds[0] == 0
        total_s = result.settings["steps"] * sum(result.samples_s[name])
        assert seconds[-1] == pytest.approx(total_s)
    path = tmp_path / "training.svg"
    main(["plot", "training", "--to", str(path)])
    root = ET.parse(path).getroot()
    words = ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text")]
    for name in TRAINERS:
        assert f"{result.value(tokens_per_s(name)):.0f} tokens/s" in words
    used = set(re.findall(r"(?:fill|stroke): (#\w+)", path.read_text()))
    assert used <= {*plot.DARK, *plot.DARK.values()}  # no color is left as it is on dark pages


def test_without_results_there_is_no_plot(tmp_path):
    with pytest.raises(SystemExit, match="There are no results of step with MPICH"):
        main(["plot", "--results", str(tmp_path)])


def test_the_summary_shows_every_case_that_has_targets(capsys, tmp_path):
    main(["summary"])
    shown = capsys.readouterr().out
    for name, case in CASES.items():
        has_targets = any(ratio.target is not None for ratio in case.ratios)
        is_measured = (RESULTS_FOLDER / f"{name}.jsonl").exists()  # not every machine has a GPU
        assert (f"\n{name}: " in f"\n{shown}") == (has_targets and is_measured)
    assert "target >= 8     met" in shown
    main(["--summary", "--results", str(RESULTS_FOLDER)])
    assert capsys.readouterr().out == shown


def test_the_summary_names_what_was_never_measured_and_marks_what_is_missed(capsys, tmp_path):
    def summarized():
        main(["summary", "--results", str(tmp_path)])
        return capsys.readouterr().out.splitlines()

    targets = [
        f"  {name}: {ratio.name.replace('{ranks}', 'ranks')}, {ratio.target}"
        for name, case in CASES.items()
        for ratio in case.ratios
        if ratio.target is not None
    ]
    _, *named, _, count = summarized()
    assert named == targets
    assert count == f"0 met, 0 MISSED, {len(targets)} never measured."

    line = [line for line in LINES if line["benchmark"] == "step" and line["ranks"] == 2][-1]
    slow = line["samples_s"] | {"shardopt": [1.0] * 5, "shardopt.torch": [1e-6] * 5}
    append(CASES["step"], Result.from_json(line | {"samples_s": slow}), tmp_path)
    out = summarized()
    missed = [text.split("  ")[1] for text in out if text.endswith("MISSED")]
    assert [name.rsplit(" / ", 1)[1] for name in missed] == ["shardopt", "shardopt"]
    assert out[-1] == f"3 met, 2 MISSED, {len(targets) - 5} never measured."
    assert not any(text.startswith("  step: ") for text in out)


def test_tables_have_the_newest_results(capsys):
    main(["tables"])
    text = capsys.readouterr().out
    figures = tables.read_figures(RESULTS_FOLDER)
    assert "](benchmarks/plots/step_time.svg)" in text
    step, memory = figures.steps[0], figures.memory[0]
    assert f"| 2 ranks, {step.origin.mpi} | **{tables.nanoseconds(step, 'shardopt'):.2f}**" in text
    assert f"**{memory.value('shardopt, bytes/parameter'):.1f}**" in text
    assert len(figures.nodes) == text.count(" nodes x ")


def test_tables_are_written_between_the_markers_of_a_file(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text("before\n<!-- figures begin -->\nold\n<!-- figures end -->\nafter\n")
    main(["tables", "--into", str(path)])
    text = path.read_text()
    assert text.startswith("before\n<!-- figures begin -->\n\n![")
    assert text.endswith("\n\n<!-- figures end -->\nafter\n")
    assert "old" not in text
    path.write_text("no markers")
    with pytest.raises(ValueError, match="must have") as caught:
        main(["tables", "--into", str(path)])
    assert FORM.fullmatch(str(caught.value))


def test_the_table_of_targets_is_up_to_date():
    assert tables.targets_table(CASES) in (FOLDER / "README.md").read_text()
