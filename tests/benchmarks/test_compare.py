"""What got slower: synthetic results whose ratios are known, with noise as runs have it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import RESULTS_FOLDER
from benchmarks.__main__ import main
from benchmarks.cases import CASES
from benchmarks.cases.step import ALL_AXPYS, ALL_TRIADS
from benchmarks.cases.step.measure import evaluate
from benchmarks.contenders.names import REDUCE_SCATTER, SHARDOPT, ZERO_REDUNDANCY
from benchmarks.contenders.problem import Problem
from benchmarks.harness.case import Claim, Target, figure
from benchmarks.harness.machine import Origin
from benchmarks.harness.record import append
from benchmarks.harness.result import Result
from benchmarks.report.comparison import MIN_ROUNDS, Change, compare, newest_runs
from tests.support.errors import FORM

STEP = CASES["step"]
USUAL_S = {
    SHARDOPT: 0.03, REDUCE_SCATTER: 0.1, ZERO_REDUNDANCY: 0.27, ALL_TRIADS: 0.04, ALL_AXPYS: 0.03
}  # fmt: skip
RATIO = f"{REDUCE_SCATTER} / {SHARDOPT}"
OVER_LIMIT = f"{SHARDOPT} / its bytes at triad's rate"


class Ranks:
    size = 2


def run(seed, *, slower=1.0, machine=1.0, rounds=9, noise=0.02, commit="abc", day=1, cpu="x"):
    """A run of ``step`` in which shardopt takes ``slower`` and everything ``machine`` times."""
    rng = np.random.default_rng(seed)
    weather = rng.lognormal(0.0, 0.1, rounds) * machine  # busy rounds, for all alike
    samples_s = {
        key: usual * weather * rng.lognormal(0, noise, rounds) for key, usual in USUAL_S.items()
    }
    samples_s[SHARDOPT] *= slower
    samples_s = {key: list(values) for key, values in samples_s.items()}
    problem = Problem(Ranks(), 1 << 25, 16, 1)
    date = f"2026-01-{day:02}T00:00:{seed % 60:02}+00:00"
    origin = Origin(date, commit, {"cpu": cpu, "cores": 2}, "MPICH 5.0.2", {})
    return replace(evaluate(problem, samples_s, 0.0, 3 << 27), origin=origin)


def changes(old, new, **settings):
    return {each.name: each.change for each in compare(STEP, old, new, **settings)}


@pytest.fixture
def write(tmp_path):
    def write(name, runs):
        for each in runs:
            append(STEP, each, tmp_path / name)
        return str(tmp_path / name)

    return write


def code_of(*words):
    with pytest.raises(SystemExit) as caught:
        main(["compare", *words])
    return caught.value.code


@pytest.mark.parametrize("machine", [1.0, 2.0, 0.4])
def test_the_same_code_is_no_slower_on_a_slower_machine(machine):
    for seed in range(10):
        found = changes([run(seed)], [run(seed + 100, machine=machine)])
        assert set(found.values()) == {Change.SAME}


@pytest.mark.parametrize("machine", [1.0, 0.5])
def test_slower_code_is_found_also_on_a_faster_machine(machine):
    found = changes([run(1)], [run(2, slower=1.3, machine=machine)])
    assert found[RATIO] == found[OVER_LIMIT] == Change.WORSE  # more of one is better, less of other
    found = changes([run(1, slower=1.3)], [run(2, machine=machine)])
    assert found[RATIO] == found[OVER_LIMIT] == Change.BETTER


def test_an_interval_covers_the_change_as_often_as_it_says():
    covered, case = 0, replace(STEP, ratios=[r for r in STEP.ratios if r.name == OVER_LIMIT])
    for seed in range(50):
        old, new = run(seed, rounds=15), run(1000 + seed, slower=1.1, rounds=15)
        (each,) = compare(case, [old], [new])
        covered += each.low <= 1.1 <= each.high
    assert covered >= 47


def test_busy_rounds_that_fall_on_all_contenders_are_no_noise():
    (each,) = [
        each
        for each in compare(STEP, [run(1, noise=0.002)], [run(2, noise=0.002)])
        if each.name == RATIO
    ]
    assert 0.98 < each.low <= each.high < 1.02  # though times of a round vary by 10 %


def test_noise_hides_what_is_smaller_and_more_rounds_show_it():
    settings = {"noise": 0.1, "slower": 1.25}
    found = changes([run(1, noise=0.1)], [run(2, **settings)], tolerance=0.02)
    assert found[OVER_LIMIT] == Change.SAME
    found = changes(
        [run(1, noise=0.1, rounds=200)], [run(2, rounds=200, **settings)], tolerance=0.02
    )
    assert found[OVER_LIMIT] == Change.WORSE


def test_runs_that_disagree_widen_the_interval():
    def interval(speeds):
        old = [run(seed) for seed in range(3)]
        new = [run(10 + seed, slower=slower) for seed, slower in enumerate(speeds)]
        each = next(each for each in compare(STEP, old, new) if each.name == OVER_LIMIT)
        return each.high - each.low, each.change

    alike, disagreeing = interval([1.3, 1.3, 1.3]), interval([1.0, 1.3, 1.6])
    assert alike[1] == Change.WORSE
    assert disagreeing == (pytest.approx(disagreeing[0]), Change.SAME)
    assert disagreeing[0] > 2 * alike[0]


def test_few_rounds_say_nothing():
    few = MIN_ROUNDS - 1
    found = changes([run(1, rounds=few)], [run(2, rounds=few, slower=3.0)])
    assert set(found.values()) == {Change.FEW}


def test_runs_beside_other_jobs_say_nothing():
    quiet, busy = run(1), replace(run(2, slower=3.0), others=0.06)
    assert set(changes([quiet], [busy]).values()) == {Change.BUSY}
    assert set(changes([busy], [quiet]).values()) == {Change.BUSY}


def test_a_count_fails_where_it_no_longer_meets_its_target():
    case = replace(STEP, ratios=(figure("MB", Target(at_most=10.0)),), claim=Claim(1 << 25))

    def change(old, new, case=case):
        sides = [[run(1).with_figures({"MB": megabytes})] for megabytes in (old, new)]
        (difference,) = compare(case, *sides)
        return difference.change

    assert change(9.0, 9.9) == change(11.0, 12.0) == change(12.0, 9.0) == Change.COUNTED
    assert change(9.0, 10.1) == Change.LOST
    assert change(9.0, 10.1, replace(case, claim=Claim(7))) == Change.COUNTED


def test_the_newest_commit_counts_with_all_its_runs_and_quiet_ones_first():
    runs = [run(0, commit="old"), *(run(seed, commit="new", day=2) for seed in (1, 2))]
    noisy = replace(run(3, commit="noisy", day=3), others=0.5)
    (kept,) = newest_runs([noisy, *runs[::-1]]).values()
    assert list(kept) == runs[1:]
    assert [list(each) for each in newest_runs([noisy]).values()] == [[noisy]]


def test_the_command_fails_if_something_got_slower(write, capsys):
    old, same = write("old", [run(1)]), write("same", [run(2)])
    worse = write("worse", [run(3, slower=1.5, cpu="y")])
    assert code_of(old, same) == 0
    assert "None of 4 ratios got worse" in capsys.readouterr().out
    assert code_of(old, f"{worse}/step.jsonl", "--times") == 1
    out = capsys.readouterr().out
    assert f": {RATIO}\n" in out.split("ratios got worse:")[1]
    assert "Ratios within each run are compared" in out
    assert "99% interval" in out
    assert "times: not comparable, as these are different machines" in out
    assert code_of(worse, old) == 0
    assert code_of(old, worse, "--tolerance", "2") == 0
    capsys.readouterr()
    assert code_of(old, same, "--times") == 0
    assert f"for information: ms of {SHARDOPT}" in capsys.readouterr().out


def test_the_command_says_if_there_is_nothing_to_compare(write, capsys, tmp_path):
    old = write("old", [run(1)])
    other = write("other", [replace(run(2), ranks=4)])
    short = write("short", [run(3, rounds=MIN_ROUNDS - 1)])
    for new, words in (
        (old, "the same runs"),
        (other, "only in NEW"),
        (tmp_path, "only in OLD"),
        (short, "4 ratios could not be judged"),
    ):
        assert code_of(old, str(new)) == 2
        out = capsys.readouterr().out
        assert "There is nothing to compare" in out
        assert words in out


def test_results_may_be_those_of_a_revision(capsys):
    assert code_of("HEAD", "HEAD") == 2
    assert "kernel: 1 x 1 thread(s)" in capsys.readouterr().out
    assert code_of("HEAD", "no-such-thing") == 2
    complaint = capsys.readouterr().err.split("NEW: ")[1].strip()
    assert FORM.fullmatch(complaint)


def test_all_that_follows_samples_is_proportional_to_their_quotient():
    """Of recorded results: otherwise an interval would be that of something else."""
    constants = {}
    for path in RESULTS_FOLDER.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            result = Result.from_json(json.loads(line))
            for ratio in CASES[result.case].ratios:
                value = ratio.of(result)
                if (
                    value
                    and ratio.follows
                    and ratio.of_rounds is None  # whose rounds are drawn themselves
                    and all(key in result.samples_s for key in ratio.follows)
                ):
                    over, under = map(result.value, ratio.follows)
                    key = result.case, ratio.name, result.ranks, result.dtype, str(result.settings)
                    constants.setdefault(key, []).append(value * under / over)
    assert constants
    for values in constants.values():
        assert values == pytest.approx([values[0]] * len(values), rel=1e-4)
