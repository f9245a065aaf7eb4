"""Cohorts: parameters that step together, and the spans of each shard that they fill."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardopt._typing import FloatArray, IntArray
from shardopt.layout.partition import Partition, Shard
from shardopt.layout.state_spec import BLOCK_NUMEL
from shardopt.rule.coefficients import NUM_COEFFICIENTS, StepCoefficients, StepCount
from shardopt.rule.hyperparams import Hyperparams
from shardopt.rule.rounding import Chance, key_of, make_salts


@dataclass(slots=True)
class Cohort:
    """Parameters of one group with equal step counts and gradients in the same steps.

    Attributes:
        group: Index of their param group.
        count: The steps they have taken.
    """

    group: int
    count: StepCount


class Cohorts:
    """The step counts of all parameters, and who steps with the same coefficients.

    A parameter without a gradient on any rank takes no step, as in torch: its count stands still.
    Such steps split cohorts; cohorts whose counts are equal again are joined.

    A step is planned first and counted only once it has been taken: ``plan``, then ``commit``.

    Args:
        partition: Where the parameters are.
        seed: Of rounding by chance.

    Attributes:
        partition: As given.
        version: Grows whenever step counts change.
    """

    def __init__(self, partition: Partition, seed: int = 0) -> None:
        self.partition = partition
        self._seed = seed
        self.version = 0
        self._cohort_of = [Cohort(p.spec.group, StepCount()) for p in partition.params]
        self._stepping: list[Cohort] = []
        self._row_of: list[int] = []
        self._present: int | None = None
        self._segments: dict[tuple[int, int], IntArray] = {}
        self._keys: dict[tuple[int, int], tuple[list[int], IntArray]] = {}
        self._planned: list[StepCount] = []
        self._coefficients: list[StepCoefficients] = []
        self._tables: dict[str, FloatArray] = {}

    @property
    def step_counts(self) -> list[StepCount]:
        """The step count of each parameter."""
        return [cohort.count for cohort in self._cohort_of]

    def extend(self, partition: Partition) -> None:
        """Take over a partition that has parameters appended."""
        added = partition.params[len(self._cohort_of) :]
        self._cohort_of += [Cohort(param.spec.group, StepCount()) for param in added]
        self.partition = partition
        self._present = None

    def rearrange(self, partition: Partition, sources: Sequence[int | None]) -> None:
        """Take over a partition of other parameters.

        Args:
            partition: The layout.
            sources: For each parameter its number so far; None for a new one.
        """
        counts = self.step_counts
        self.partition = partition
        self._set_counts([StepCount() if i is None else counts[i] for i in sources])

    def set_step_counts(self, step_counts: Sequence[StepCount]) -> None:
        """Continue from other step counts, one for each parameter."""
        self._set_counts(step_counts)
        self.version += 1

    def _set_counts(self, step_counts: Sequence[StepCount]) -> None:
        pairs = zip(self.partition.params, step_counts, strict=True)
        self._cohort_of = [Cohort(param.spec.group, count) for param, count in pairs]
        self._present = None

    def plan(
        self,
        present: int,
        hypers: Sequence[Hyperparams],
        grad_scale: float,
        mean_scale: float = 1.0,
    ) -> None:
        """Compute the coefficients of a step; nothing is counted before ``commit``.

        Args:
            present: Bit mask of the parameters that have a gradient on some rank.
            hypers: Of each param group.
            grad_scale: See ``Hyperparams.coefficients``.
            mean_scale: Likewise.
        """
        if present != self._present:
            self._regroup(present)
        self._planned = [hypers[c.group].after_step(c.count) for c in self._stepping]
        self._coefficients = [
            hypers[cohort.group].coefficients(count, grad_scale, mean_scale)
            for cohort, count in zip(self._stepping, self._planned, strict=True)
        ]
        self._tables = {}

    def commit(self) -> None:
        """Count the step that was planned and has now been taken."""
        for cohort, count in zip(self._stepping, self._planned, strict=True):
            cohort.count = count
        self.version += 1

    def coefficients(self, dtype: str) -> FloatArray:
        """Return the planned coefficients in ``dtype``, [num_cohorts, NUM_COEFFICIENTS]."""
        if dtype not in self._tables:
            table = np.array(self._coefficients, dtype)
            self._tables[dtype] = table.reshape(-1, NUM_COEFFICIENTS)
        return self._tables[dtype]

    def segments(self, shard: Shard) -> IntArray:
        """Return the segments of a shard for the planned step.

        Returns:
            [num_segments, 3]: start and stop, counted from the start of the shard, and the row of
            ``coefficients``.
        """
        key = shard.start, shard.stop
        if key not in self._segments:
            segments = self.partition.segments(shard, self._row_of)
            rows = [(s.start - shard.start, s.stop - shard.start, s.cohort) for s in segments]
            self._segments[key] = np.array(rows, np.int64).reshape(-1, 3)
        return self._segments[key]

    def chance(self, shard: Shard) -> Chance | None:
        """Return what rounding by chance needs in the planned step; None if nothing rounds so.

        It has an entry for each of ``segments``.
        """
        if not self.partition.regions[shard.region].form.rounds_by_chance:
            return None
        segments, at = self.segments(shard), (shard.start, shard.stop)
        if at not in self._keys:
            starts = [shard.start + start for start in segments[:, 0].tolist()]
            params = self.partition.params_at(shard.region, starts)
            keys = [key_of(param.spec.name, self._seed) for param in params]
            places = [start - param.start for start, param in zip(starts, params, strict=True)]
            assert not any(place % BLOCK_NUMEL for place in places)
            self._keys[at] = keys, np.array(places, np.int64)
        known = self._keys[at]
        steps = [self._planned[row].step for row in segments[:, 2].tolist()]
        return Chance(make_salts(known[0], steps), known[1])

    def _regroup(self, present: int) -> None:
        """Form new cohorts: the parameters of the bit mask ``present`` step, others do not."""
        self._present = present
        self._segments, self._keys = {}, {}
        found: dict[tuple[int, int, float, bool], Cohort] = {}
        for index, cohort in enumerate(self._cohort_of):
            count, steps = cohort.count, bool(present >> index & 1)
            key = (cohort.group, count.step, count.mu_product, steps)
            if key not in found:
                found[key] = Cohort(cohort.group, count)
            self._cohort_of[index] = found[key]
        self._stepping = [cohort for (*_, steps), cohort in found.items() if steps]
        rows = {id(cohort): row for row, cohort in enumerate(self._stepping)}
        self._row_of = [rows.get(id(cohort), -1) for cohort in self._cohort_of]
