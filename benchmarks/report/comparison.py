"""The comparison of two sets of results: what got slower, beyond the noise.

[Note: ratios within a run are compared, not times]
Neighbours, clocks and the addresses that memory happens to have change all times of a run together,
so times of two runs say little of a change between them. Contenders take turns within a run. Their
ratio, of each run by itself, is therefore compared between runs.

Its noise is estimated by a bootstrap: rounds are drawn with replacement, the same ones for all
contenders of a ratio, and if several runs are known of a commit, runs are drawn first. A ratio got
worse if the whole interval of its change lies beyond a tolerance. The tolerance stands for what
rounds of a single run cannot show: a ratio of the same code differs between processes, too, by some
10 % on a rented machine. Several runs on each side show it, and allow for a smaller tolerance. If
other jobs took more of the cores than ``QUIET``, nothing is said: they fall on contenders unevenly.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.case import Case, Ratio
from benchmarks.harness.result import Result

CONFIDENCE = 0.99
TOLERANCE = 0.1
MIN_ROUNDS = 5
"""With fewer rounds an interval is no estimate of anything."""
NUM_DRAWS = 2000

Setting = tuple[str, ...]
Draws = NDArray[np.float64]
Runs = Sequence[Result]
"""Runs of one case with the same settings and of one commit, newest last."""


class Change(StrEnum):
    """The outcome of comparing a ratio."""

    WORSE = "WORSE"
    BETTER = "better"
    SAME = "within noise"
    BUSY = "other jobs ran"
    FEW = f"fewer than {MIN_ROUNDS} rounds"
    OTHER = "changed"
    COUNTED = "not timed"
    LOST = "NO LONGER MET"


@dataclass(frozen=True, slots=True)
class Difference:
    """A ratio in two sets of results.

    Attributes:
        name: Of the ratio.
        old: Its value before: the median over runs.
        new: Its value now.
        low: Lower end of the interval of ``new / old``; NaN where there is none.
        high: Its upper end.
        change: The verdict.
    """

    name: str
    old: float
    new: float
    low: float
    high: float
    change: Change

    @property
    def is_regression(self) -> bool:
        """True if the ratio got worse for certain."""
        return self.change in (Change.WORSE, Change.LOST)

    @property
    def is_judged(self) -> bool:
        """True unless the runs are too short or too noisy to tell."""
        return self.change not in (Change.BUSY, Change.FEW)


def setting_of(result: Result) -> Setting:
    """Return all that two results must have in common to be compared."""
    settings = ", ".join(f"{key} {value}" for key, value in sorted(result.settings.items()))
    return (
        result.case,
        f"{result.ranks} x {result.threads} thread(s)",
        f"{result.numel:,} {result.dtype}",
        settings,
        result.origin.mpi.rpartition(" ")[0],
    )


def newest_runs(results: Iterable[Result]) -> dict[Setting, Runs]:
    """Pick the runs of the newest commit for each setting, and of those the quiet ones if any."""
    by_setting: dict[Setting, list[Result]] = {}
    for result in sorted(results, key=lambda each: each.origin.date):
        by_setting.setdefault(setting_of(result), []).append(result)
    return {setting: _of_one_commit(runs) for setting, runs in by_setting.items()}


def _of_one_commit(runs: Runs) -> Runs:
    quiet = [run for run in runs if run.is_quiet]
    kept = quiet or runs
    return [run for run in kept if run.origin.commit == kept[-1].origin.commit]


def compare(case: Case, old: Runs, new: Runs, tolerance: float = TOLERANCE) -> list[Difference]:
    """Compare all ratios that both sides have.

    Args:
        case: That both have measured, with the same settings.
        old: Its runs before.
        new: Its runs now.
        tolerance: Relative change that may have other reasons than the code.
    """
    found = []
    for ratio in case.ratios:
        # Of a ratio that some runs lack, such as that to the shorter one of two limits, the others.
        sides = [[run for run in runs if ratio.of(run) is not None] for runs in (old, new)]
        if all(sides):
            claimed = case.claim.covers(sides[1][-1])
            found.append(_differ(ratio, sides, tolerance, claimed=claimed))
    return found


def _differ(ratio: Ratio, sides: Sequence[Runs], tolerance: float, *, claimed: bool) -> Difference:
    values = [median(ratio.of(run) or 0.0 for run in runs) for runs in sides]
    low = high = float("nan")
    every_run = [run for runs in sides for run in runs]
    if not all(_is_timed(ratio, run) for run in every_run):
        target, mpi = ratio.target if claimed else None, every_run[-1].origin.mpi
        met = [target is None or target.is_met(value, mpi) for value in values]
        change = Change.LOST if met == [True, False] else Change.COUNTED
    elif not all(run.is_quiet for run in every_run):
        change = Change.BUSY
    elif min(_num_rounds(ratio, run) for run in every_run) < MIN_ROUNDS:
        change = Change.FEW
    else:
        before, after = (_draw(ratio, runs, seed) for seed, runs in enumerate(sides))
        outside = (1 - CONFIDENCE) / 2
        low, high = map(float, np.quantile(after / before, (outside, 1 - outside)))
        change = _judge(ratio.more_is_better, low, high, 1 + tolerance)
    name = ratio.name.replace("{ranks}", "ranks")
    return Difference(name, values[0], values[1], low, high, change)


def _judge(more_is_better: bool | None, low: float, high: float, bound: float) -> Change:
    below, above = high < 1 / bound, low > bound
    if not (below or above):
        return Change.SAME
    if more_is_better is None:
        return Change.OTHER
    return Change.BETTER if above == more_is_better else Change.WORSE


def _is_timed(ratio: Ratio, run: Result) -> bool:
    return bool(ratio.follows) and all(key in run.samples_s for key in ratio.follows)


def _num_rounds(ratio: Ratio, run: Result) -> int:
    return min(len(run.samples_s[key]) for key in ratio.follows)


def _draw(ratio: Ratio, runs: Runs, seed: int) -> Draws:
    """Return the ratio in each of NUM_DRAWS bootstrap samples: its median over the runs drawn."""
    generator = np.random.default_rng(seed)
    of_runs = np.stack([_draw_rounds(ratio, run, generator) for run in runs])
    chosen = generator.integers(len(runs), size=of_runs.shape)
    values: Draws = np.median(np.take_along_axis(of_runs, chosen, axis=0), axis=0)
    return values


def _draw_rounds(ratio: Ratio, run: Result, generator: np.random.Generator) -> Draws:
    """Return the ratio of one run in each bootstrap sample of its rounds."""
    value = ratio.of(run)
    assert value is not None
    counts = {len(run.samples_s[key]) for key in ratio.follows}
    rounds = {count: generator.integers(count, size=(NUM_DRAWS, count)) for count in counts}
    if ratio.of_rounds is not None:
        of_rounds = np.array(ratio.of_rounds(run))
        medians: Draws = np.median(of_rounds[rounds[of_rounds.size]], axis=1)
        return medians
    over, under = (
        np.median(np.array(samples)[rounds[len(samples)]], axis=1) / median(samples)
        for samples in map(run.samples_s.__getitem__, ratio.follows)
    )
    draws: Draws = value * over / under
    return draws
