"""Step counts advance when a step is committed; parameters that step alike share coefficients."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardopt.layout.partition import ParamSpec, plan_partition
from shardopt.rule.coefficients import StepCount
from shardopt.rule.cohorts import Cohorts
from shardopt.rule.nadam import NAdam

HYPERS = [NAdam(), NAdam(lr=0.1, momentum_decay=0.5)]


def make(num_params=3):
    specs = [ParamSpec(f"w{i}", (10,), "float32", i % 2) for i in range(num_params)]
    return Cohorts(plan_partition(specs, 1, 1, 1 << 20))


def step(cohorts, present):
    cohorts.plan(present, HYPERS, 1.0)
    cohorts.commit()


def rows_of(cohorts):
    """The row of coefficients of each parameter, by the segments of the only shard."""
    (shard,) = cohorts.partition.shards(0, 0, 0)
    rows = {}
    for start, stop, row in cohorts.segments(shard):
        for index, span in cohorts.partition.params_in(0, shard):
            if start <= span.start - shard.start < stop:
                rows[index] = int(row)
    return rows


def test_nothing_is_counted_before_the_commit():
    cohorts = make()
    cohorts.plan(0b111, HYPERS, 1.0)
    assert cohorts.step_counts == [StepCount()] * 3
    cohorts.commit()
    assert [count.step for count in cohorts.step_counts] == [1, 1, 1]


def test_a_step_that_is_planned_again_is_counted_once():
    cohorts = make()
    for _ in range(3):
        cohorts.plan(0b111, HYPERS, 1.0)
    cohorts.commit()
    assert [count.step for count in cohorts.step_counts] == [1, 1, 1]


def test_the_coefficients_are_those_of_the_step_to_come():
    cohorts = make()
    step(cohorts, 0b111)
    cohorts.plan(0b111, HYPERS, 0.25)
    rows, table = rows_of(cohorts), cohorts.coefficients("float64")
    for index, hyper in ((0, HYPERS[0]), (1, HYPERS[1]), (2, HYPERS[0])):
        count = hyper.after_step(hyper.after_step(StepCount()))
        expected = hyper.coefficients(count, 0.25)
        np.testing.assert_array_equal(table[rows[index]], expected)
    assert rows[0] == rows[2] != rows[1]


def test_parameters_without_a_gradient_stand_still_and_join_again():
    cohorts = make(4)
    step(cohorts, 0b1111)
    step(cohorts, 0b0111)
    assert [count.step for count in cohorts.step_counts] == [2, 2, 2, 1]
    cohorts.plan(0b1111, HYPERS, 1.0)
    assert len(cohorts.coefficients("float32")) == 3
    cohorts.set_step_counts([StepCount(5, 0.5)] * 4)
    cohorts.plan(0b1111, HYPERS, 1.0)
    assert len(cohorts.coefficients("float32")) == 2  # one for each group


@given(st.lists(st.integers(0, 31), max_size=8))
def test_counts_are_what_single_parameters_would_have(masks):
    cohorts = make(5)
    expected = [StepCount()] * 5
    for mask in masks:
        step(cohorts, mask)
        for index in range(5):
            if mask >> index & 1:
                expected[index] = HYPERS[index % 2].after_step(expected[index])
        assert cohorts.step_counts == expected
