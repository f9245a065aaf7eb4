"""Cohorts: parameters that step together, and the spans of each shard that they fill."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardopt._typing import IntArray
from shardopt.layout.partition import Partition, Shard
from shardopt.rule.nadam import Hyperparams, StepCoefficients, StepCount, step_coefficients


@dataclass(slots=True)
class Cohort:
    """Parameters of one group with equal step counts and gradients in the same steps."""

    group: int
    clock: StepCount


class Cohorts:
    """The step_counts of all parameters, and the segments that follow from who has a gradient.

    A parameter without a gradient on any rank does not step, as in torch: its clock stands
    still. Such steps split cohorts; cohorts whose step_counts agree again are joined.

    Attributes:
        step_counts: For each parameter its own clock, shared within a cohort.
        cohorts: Those that step under the present mask; the rows of the coefficients.
    """

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.step_counts = [StepCount() for _ in partition.params]
        self.cohorts: list[Cohort] = []
        self._cohort_of: list[int] = []
        self._present: int | None = None
        self._segments: dict[tuple[int, int], IntArray] = {}

    def extend(self, partition: Partition) -> None:
        """Take over a partition that has parameters appended."""
        self.step_counts += [StepCount() for _ in partition.params[len(self.step_counts) :]]
        self.partition = partition
        self._present = None

    def set_clocks(self, step_counts: Sequence[StepCount]) -> None:
        """Go on from other step_counts, one for each parameter."""
        self.step_counts = list(step_counts)
        self._present = None

    def regroup(self, present: int) -> None:
        """Arrange cohorts for a step in which the parameters of the bit mask have gradients."""
        if present == self._present:
            return
        self._present = present
        self._segments = {}
        found: dict[tuple[int, int, float, bool], StepCount] = {}
        for index, param in enumerate(self.partition.params):
            clock, steps = self.step_counts[index], bool(present >> index & 1)
            key = (param.spec.group, clock.step, clock.mu_product, steps)
            self.step_counts[index] = found.setdefault(key, replace(clock))
        stepping = {key: clock for key, clock in found.items() if key[3]}
        self.cohorts = [Cohort(key[0], clock) for key, clock in stepping.items()]
        row_of = {id(clock): row for row, clock in enumerate(stepping.values())}
        self._cohort_of = [row_of.get(id(clock), -1) for clock in self.step_counts]

    def advance(self, hypers: Sequence[Hyperparams], grad_scale: float) -> list[StepCoefficients]:
        """Count one step for every cohort and give the coefficients of it, a row for each."""
        for cohort in self.cohorts:
            cohort.clock.advance(hypers[cohort.group])
        return [step_coefficients(hypers[c.group], c.clock, grad_scale) for c in self.cohorts]

    def segments(self, shard: Shard) -> IntArray:
        """Give [num_segments, 3]: start and stop, counted within the region, and cohort."""
        key = shard.start, shard.stop
        if key not in self._segments:
            zero = self.partition.regions[shard.region].start
            runs = self.partition.segments(shard, self._cohort_of)
            rows = [(run.start - zero, run.stop - zero, run.cohort) for run in runs]
            self._segments[key] = np.array(rows, np.int64).reshape(-1, 3)
        return self._segments[key]
