"""Which parameters step together: cohorts, their clocks, and the runs of each shard they fill."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardopt.kernels.base import IntArray
from shardopt.nadam import Clock, Hyperparams, StepCoefficients, step_coefficients
from shardopt.partition import Partition, Shard


@dataclass(slots=True)
class Cohort:
    """Parameters of one group whose clocks agree and which have a gradient in the same steps."""

    group: int
    clock: Clock


class Schedule:
    """The clocks of all parameters, and the segments that follow from who has a gradient.

    A parameter without a gradient on any rank does not step, as in torch: its clock stands
    still. Such steps split cohorts; cohorts whose clocks agree again are joined.

    Attributes:
        clocks: For each parameter its own clock, shared within a cohort.
        cohorts: Those that step under the present mask; the rows of the coefficients.
    """

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.clocks = [Clock() for _ in partition.params]
        self.cohorts: list[Cohort] = []
        self._cohort_of: list[int] = []
        self._present: int | None = None
        self._segments: dict[tuple[int, int], IntArray] = {}

    def extend(self, partition: Partition) -> None:
        """Take over a partition that has parameters appended."""
        self.clocks += [Clock() for _ in partition.params[len(self.clocks) :]]
        self.partition = partition
        self._present = None

    def set_clocks(self, clocks: Sequence[Clock]) -> None:
        """Go on from other clocks, one for each parameter."""
        self.clocks = list(clocks)
        self._present = None

    def regroup(self, present: int) -> None:
        """Arrange cohorts for a step in which the parameters of the bit mask have gradients."""
        if present == self._present:
            return
        self._present = present
        self._segments = {}
        found: dict[tuple[int, int, float, bool], Clock] = {}
        for index, param in enumerate(self.partition.params):
            clock, steps = self.clocks[index], bool(present >> index & 1)
            key = (param.spec.group, clock.step, clock.mu_product, steps)
            self.clocks[index] = found.setdefault(key, replace(clock))
        stepping = {key: clock for key, clock in found.items() if key[3]}
        self.cohorts = [Cohort(key[0], clock) for key, clock in stepping.items()]
        row_of = {id(clock): row for row, clock in enumerate(stepping.values())}
        self._cohort_of = [row_of.get(id(clock), -1) for clock in self.clocks]

    def advance(self, hypers: Sequence[Hyperparams], grad_scale: float) -> list[StepCoefficients]:
        """Count one step for every cohort and give the coefficients of it, a row for each."""
        for cohort in self.cohorts:
            cohort.clock.advance(hypers[cohort.group])
        return [step_coefficients(hypers[c.group], c.clock, grad_scale) for c in self.cohorts]

    def segments(self, shard: Shard) -> IntArray:
        """Give [num_segments, 3]: start and stop, counted within the section, and cohort."""
        key = shard.start, shard.stop
        if key not in self._segments:
            zero = self.partition.sections[shard.section].start
            runs = self.partition.segments(shard, self._cohort_of)
            rows = [(run.start - zero, run.stop - zero, run.cohort) for run in runs]
            self._segments[key] = np.array(rows, np.int64).reshape(-1, 3)
        return self._segments[key]
