"""Cases as they are declared: targets, options, and what their declaration may load."""

import argparse
import ast
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks import FOLDER
from benchmarks.__main__ import main
from benchmarks.cases import CASES
from benchmarks.harness.case import Case, Claim, Ratio, Target, figure, paired_quotient, quotient
from benchmarks.harness.machine import Origin
from benchmarks.harness.medians import interval_of_median
from benchmarks.harness.options import add_options, read_options
from benchmarks.harness.result import Result
from tests.support.errors import FORM

PUBLIC = {"shardopt", *(f"shardopt.{name}" for name in ("checkpoint", "errors", "numpy"))}
RATIOS = [(case, ratio) for case in CASES.values() for ratio in case.ratios]


def result(mpi="MPICH 5.0.2", **changes):
    origin = Origin("2026-01-01T00:00:00+00:00", "abc", {"cpu": "x", "cores": 2}, mpi, {})
    settings = {"case": "made up", "ranks": 2, "threads": 1, "dtype": "float32", "numel": 8}
    return Result(**settings | {"origin": origin} | changes)


def case(target, claim=None):
    ratios = (quotient("a", "b", target), figure("c"), quotient("a", "missing"))
    return Case("made up", "", "", "", object, claim or Claim(8), ratios)


@pytest.mark.parametrize("bounds", [{}, {"at_least": 1.0, "at_most": 2.0}])
def test_a_target_has_one_bound(bounds):
    with pytest.raises(ValueError, match="one bound") as caught:
        Target(**bounds)
    assert FORM.fullmatch(str(caught.value))


@pytest.mark.parametrize(
    ("bounds", "met", "missed"),
    [({"at_least": 2.0}, (2.0, 3.0), (1.9, math.nan)), ({"at_most": 2.0}, (2.0, 1.0), (2.1,))],
)
def test_a_target_is_met_on_its_side_of_the_bound(bounds, met, missed):
    target = Target(**bounds)
    assert all(map(target.is_met, met))
    assert not any(map(target.is_met, missed))


def test_a_paired_quotient_is_the_median_of_those_of_rounds():
    slow = [float(speed) for speed in range(1, 10)]  # of a machine that is faster every round
    over = [2.2 * each for each in slow[:4]] + [2 * each for each in slow[4:]]
    measured = result(samples_s={"a": over, "b": slow})
    pair = paired_quotient("a", "b", Target(at_most=2.1))
    assert pair.of(measured) == pytest.approx(2)
    assert pair.interval(measured) == pytest.approx((2, 2.2))
    (verdict,) = Case("made up", "", "", "", object, Claim(8), (pair,)).judge(measured)
    assert verdict.met
    assert verdict.to_json()["interval"] == pytest.approx((2, 2.2))
    assert pair.interval(result(samples_s={"b": slow})) is None
    assert quotient("a", "b").interval(measured) is None


def test_the_interval_of_a_median_is_as_wide_as_chance_demands():
    """Numbers of samples left out on each side: tables of the sign test, such as Conover's."""
    assert interval_of_median([3.0, 1.0, 2.0, 5.0, 4.0]) is None
    for count, rank in ((6, 1), (9, 2), (12, 3), (20, 6), (25, 8), (50, 18)):
        samples = [float(number) for number in range(count, 0, -1)]
        assert interval_of_median(samples) == (rank, count + 1 - rank)
    assert interval_of_median([float(n) for n in range(20)], 0.99) == (3, 16)


def test_a_target_may_be_another_one_with_some_mpi_libraries():
    target = Target(at_most=1.12, with_mpi={"Open MPI": 1.2})
    assert target.bound("Open MPI 5.0.11") == 1.2
    assert target.bound("MPICH 5.0.2") == target.bound() == 1.12
    assert str(target) == "at most 1.12 (Open MPI: 1.2)"


def test_a_case_judges_medians_and_figures_by_its_targets():
    measured = result(samples_s={"a": [9.0, 4.0, 6.0], "b": [2.0]}, figures={"c": 5.0})
    over, alone = case(Target(at_most=2.5)).judge(measured)
    assert (over.name, over.value, over.bound, over.met) == ("a / b", 3.0, 2.5, False)
    assert (alone.name, alone.value, alone.bound, alone.met) == ("c", 5.0, None, None)


def test_nothing_is_divided_by_zero():
    assert case(Target(at_most=2.5)).judge(result(samples_s={"a": [1.0], "b": [0.0]})) == []


@pytest.mark.parametrize(
    "changes",
    [{"numel": 9}, {"dtype": "bfloat16"}, {"ranks": 1}, {"settings": {"rate": "1mbit"}}],
    ids=str,
)
def test_nothing_is_claimed_of_other_settings(changes):
    measured = {"samples_s": {"a": [6.0], "b": [2.0]}}
    claim = Claim(8, min_ranks=2, settings={"rate": "1gbit"})
    judged = case(Target(at_most=2.5), claim).judge(result(**measured, **changes))
    assert [(verdict.target, verdict.met) for verdict in judged] == [(None, None)]
    judged = case(Target(at_most=2.5), claim).judge(result(**measured))
    assert [verdict.met for verdict in judged] == [False]


@pytest.mark.parametrize(("case", "ratio"), RATIOS, ids=[f"{c.name}: {r.name}" for c, r in RATIOS])
def test_ratios_and_targets_are_well_formed(case, ratio):
    assert ratio.reads
    assert isinstance(ratio, Ratio)
    if ratio.target is not None:
        bounds = [ratio.target.bound(), *ratio.target.with_mpi.values()]
        assert all(math.isfinite(bound) and bound > 0 for bound in bounds)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_says_what_it_is(case):
    names = [ratio.name for ratio in case.ratios]
    assert len(names) == len(set(names))
    assert f"-m benchmarks {case.name}" in case.start
    assert (FOLDER / "cases" / case.name / "measure.py").exists()
    assert all(field.metadata["text"] for field in fields(case.options))


def test_the_list_has_every_case_and_target(capsys):
    main([])
    listed = capsys.readouterr().out
    for case, ratio in RATIOS:
        assert f"{case.name}: {case.measures}" in listed
        if ratio.target is not None:
            assert str(ratio.target) in listed


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_has_a_small_version_or_says_why_not(case):
    if isinstance(case.quick, str):
        assert case.quick.startswith("it needs")
        return
    parser = argparse.ArgumentParser()
    add_options(parser, {case.name: case.options})
    options = read_options(case.options, parser.parse_args(case.quick.words))
    assert options != case.options()


@pytest.mark.parametrize(
    "words",
    [[], ["kernel"], ["plot"], ["tables"], ["summary"], ["compare"], ["--quick"]],
    ids=str,
)
def test_help(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    assert "usage: python -m benchmarks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["kernl"], "a case must be one of kernel, codes, overhead"),
        (["overhead", "--sources", "2"], "unrecognized arguments: --sources"),
        (["step", "--skip", "us"], "invalid choice"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_measured(words, complaint, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


def test_cases_are_declared_without_mpi_and_without_numba():
    code = "import sys, benchmarks.__main__; print(*sys.modules)"
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=FOLDER.parent)
    assert "benchmarks.cases.nodes" in out.split()
    assert not {"matplotlib", "mpi4py", "numba", "shardopt", "torch"}.intersection(out.split())


def imported_by(path: Path):
    """Modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_what_is_not_public_is_used_in_one_place():
    for path in FOLDER.rglob("*.py"):
        if path != FOLDER / "contenders" / "internals.py":
            ours = {name for name in imported_by(path) if name.split(".")[0] == "shardopt"}
            free = ("shardopt.measure", "shardopt.planner")
            assert {name for name in ours if not name.startswith(free)} <= PUBLIC
