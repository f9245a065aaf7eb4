"""The tests that every kernel must pass; a test file for a kernel subclasses these."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardopt.backends.base import ALL_FINITE, UpdatePlan
from shardopt.layout.dtypes import DTYPES, compute_dtype, has_master
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.rule.coefficients import NUM_COEFFICIENTS, StepCoefficients, StepCount
from shardopt.rule.nadam import NAdam
from shardopt.rule.rules import RULES
from tests.support.kernel_arrays import (
    OVERFLOWS,
    SIXTEEN_BITS,
    Arena,
    assert_equal_arenas,
    assert_same_bits,
    cast,
    coefficient_rows,
    every_pattern,
    hard_to_round,
    tree_sum,
)
from tests.support.papers import PAPERS
from tests.support.reference import PaperNAdam

TOLERANCE = {"float32": 2e-6, "float64": 1e-14}
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.mark.parametrize("dtype", DTYPES)
class UpdateSuite:
    """``Kernel.update``. Subclasses of all suites give a fixture ``kernel``, a ``HostKernel``."""

    @pytest.mark.parametrize("num_sources", [1, 2, 3, 4, 7])
    @pytest.mark.parametrize("variant", ["torch", "keras", "optax", "lucid"])
    def test_update_follows_the_paper(self, kernel, dtype, num_sources, variant):
        arena = Arena(num_sources, dtype)
        exp_avg, exp_avg_sq = arena.state["exp_avg"], arena.state["exp_avg_sq"]
        exp_avg[:] = exp_avg_sq[:] = 0
        hyper = {"variant": variant, "weight_decay": 0.1, "lr": 0.01}
        paper = PaperNAdam(arena.in_full, **hyper)
        count = StepCount()
        for step in range(3):
            rng = np.random.default_rng(step)
            for grad in arena.grads:
                grad[:] = rng.standard_normal(grad.shape)
            paper.step(np.array(arena.grads).astype(np.float64).sum(axis=0))
            count = NAdam(**hyper).after_step(count)
            rows = coefficient_rows(dtype, (count.step, count.mu_product), **hyper)
            assert arena.update_all(kernel, rows) == ALL_FINITE
        bound = 10 * TOLERANCE[compute_dtype(dtype)]
        tolerance = {"rtol": bound, "atol": bound}
        np.testing.assert_allclose(arena.in_full, paper.param, **tolerance)
        np.testing.assert_allclose(exp_avg, paper.exp_avg, **tolerance)
        np.testing.assert_allclose(exp_avg_sq, paper.exp_avg_sq, **tolerance)
        assert_same_bits(arena.param, arena.in_full.astype(dtype))

    @pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam"])
    def test_other_rules_follow_their_papers(self, kernel, dtype, name):
        arena, rule, hyper = Arena(2, dtype), RULES[name], {"lr": 0.01, "betas": (0.9, 0.9)}
        exp_avg, exp_avg_sq = arena.state["exp_avg"], arena.state["exp_avg_sq"]
        exp_avg[:] = exp_avg_sq[:] = 0
        paper = PAPERS[name](arena.in_full, **hyper)
        for step in range(1, 9):  # RAdam knows the second moment from the sixth on
            rng = np.random.default_rng(step)
            for grad in arena.grads:
                grad[:] = rng.standard_normal(grad.shape)
            paper.step(np.array(arena.grads).astype(np.float64).sum(axis=0))
            rows = coefficient_rows(dtype, (step,), rule=rule, **hyper)
            assert arena.update_all(kernel, rows) == ALL_FINITE
        bound = 10 * TOLERANCE[compute_dtype(dtype)]
        np.testing.assert_allclose(arena.in_full, paper.param, rtol=bound, atol=bound)

    def test_a_second_moment_that_is_left_out_may_overflow(self, kernel, dtype):
        arena = Arena(1, dtype)
        arena.state["exp_avg_sq"][::2] = np.inf
        before = arena.in_full.copy()
        left_out, used = coefficient_rows(dtype, (1,), (99,), rule=RULES["RAdam"], lr=0.5)
        assert arena.update_all(kernel, left_out[None]) == ALL_FINITE
        moved = arena.in_full != before
        assert moved.mean() > 0.99
        assert np.isinf(arena.state["exp_avg_sq"][::2]).all()
        before = arena.in_full.copy()
        assert arena.update_all(kernel, used[None]) == ALL_FINITE
        assert (arena.in_full[::2] == before[::2]).all()  # as in torch: divided by inf

    @pytest.mark.parametrize("num_targets", [1, 2])
    def test_only_segments_are_written(self, kernel, dtype, num_targets):
        arena = Arena(2, dtype, num_targets=num_targets)
        for copy in arena.params[1:]:
            copy[:] = arena.param
        before = arena.written()
        grads = [grad.copy() for grad in arena.grads]
        segments = [[5, 9, 0], [5000, arena.numel - 1, 1]]
        arena.update(kernel, segments, coefficient_rows(dtype, (1, 0.5), (7, 0.1), lr=0.5))
        inside = np.zeros(arena.numel, bool)
        for start, stop, _ in segments:
            inside[start:stop] = True
        for old, new in zip(before, arena.written(), strict=True):
            share = (old[inside] != new[inside]).mean()  # 16 bits do not show small changes
            assert share > 0.9 if has_master(dtype) else share == 1
            assert_same_bits(new[~inside], old[~inside])
        for old, new in zip(grads, arena.grads, strict=True):
            assert_same_bits(new, old)

    def test_each_segment_has_its_coefficients(self, kernel, dtype):
        rows = coefficient_rows(dtype, (1, 0.5), (7, 0.1))
        split, first, second = (Arena(1, dtype) for _ in range(3))
        split.update(kernel, [[0, 4321, 0], [4321, split.numel, 1]], rows)
        first.update(kernel, [[0, first.numel, 0]], rows)
        second.update(kernel, [[0, second.numel, 1]], rows)
        np.testing.assert_array_equal(split.in_full[:4321], first.in_full[:4321])
        np.testing.assert_array_equal(split.in_full[4321:], second.in_full[4321:])

    @pytest.mark.parametrize("num_targets", [2, 3])
    def test_every_target_gets_the_result(self, kernel, dtype, num_targets):
        one, several = Arena(2, dtype), Arena(2, dtype, num_targets=num_targets)
        rows = coefficient_rows(dtype, (3, 0.3))
        segments = [[7, 1029, 0], [4064, one.numel - 5, 0]]
        assert one.update(kernel, segments, rows) == ALL_FINITE
        assert several.update(kernel, segments, rows) == ALL_FINITE  # others were NaN: never read
        for key, array in one.state.items():
            assert_same_bits(several.state[key], array)
        assert_same_bits(several.param, one.param)
        inside = np.r_[7:1029, 4064 : one.numel - 5]
        for copy in several.params[1:]:
            assert_same_bits(copy[inside], one.param[inside])
            assert np.isnan(np.delete(copy, inside)).all()

    @pytest.mark.parametrize("num_sources", [1, 2, 5])
    def test_sources_may_lie_anywhere(self, kernel, dtype, num_sources):
        scattered, matrix = Arena(num_sources, dtype), Arena(num_sources, dtype)
        matrix.grads = list(np.array(matrix.grads))
        backwards = Arena(num_sources, dtype)
        copies = [backwards.guards.array(grad) for grad in reversed(backwards.grads)]
        backwards.grads = copies[::-1]
        rows = coefficient_rows(dtype, (3, 0.3))
        for arena in (scattered, matrix, backwards):
            arena.update_all(kernel, rows)
        assert_equal_arenas(matrix, scattered)
        assert_equal_arenas(matrix, backwards)

    @pytest.mark.parametrize("num_targets", [1, 2])
    def test_pieces_have_the_bits_of_the_whole(self, kernel, dtype, num_targets):
        whole, pieces = (Arena(3, dtype, num_targets=num_targets) for _ in range(2))
        rows = coefficient_rows(dtype, (3, 0.3), (7, 0.1))
        segments = [[3, 900, 1], [999, 5000, 0], [5000, whole.numel, 1]]
        whole.update(kernel, segments, rows)
        before = pieces.written()
        first, second = whole.whole.chunks(CHUNK_NUMEL)
        pieces.update(kernel, segments, rows, second)
        for old, new in zip(before, pieces.written(), strict=True):
            assert_same_bits(new[first.slice], old[first.slice])
        pieces.update(kernel, segments, rows, first)
        assert_equal_arenas(whole, pieces)

    @pytest.mark.parametrize("poison", [np.nan, np.inf])
    @pytest.mark.parametrize("num_targets", [1, 2])
    def test_poison_is_reported(self, kernel, dtype, poison, num_targets):
        arena = Arena(2, dtype, num_targets=num_targets)
        position = CHUNK_NUMEL + 77
        arena.grads[1][position] = poison
        flag = arena.update_all(kernel, coefficient_rows(dtype, (1, 0.5)))
        assert flag != ALL_FINITE
        assert flag <= position < flag + CHUNK_NUMEL
        for param in arena.params:
            assert np.flatnonzero(~np.isfinite(param)).tolist() == [position]

    def test_the_first_poison_of_the_piece_counts(self, kernel, dtype):
        rows = coefficient_rows(dtype, (1, 0.5))
        positions = 30, CHUNK_NUMEL + 7, 2 * CHUNK_NUMEL - 1
        first, second = Arena(1, dtype).whole.chunks(CHUNK_NUMEL)
        for span, expected in ((Span(0, 2 * CHUNK_NUMEL), 30), (second, positions[1])):
            arena = Arena(1, dtype)
            arena.grads[0][list(positions)] = np.nan
            flag = arena.update_all(kernel, rows, span)
            assert flag <= expected < flag + CHUNK_NUMEL
            assert flag // CHUNK_NUMEL == expected // CHUNK_NUMEL
        arena = Arena(1, dtype)
        arena.grads[0][list(positions[1:])] = np.nan
        assert arena.update_all(kernel, rows, first) == ALL_FINITE

    def test_without_segments_nothing_happens(self, kernel, dtype):
        arena = Arena(1, dtype)
        before = arena.written()
        assert arena.update(kernel, [], coefficient_rows(dtype, (1, 0.5))) == ALL_FINITE
        for old, new in zip(before, arena.written(), strict=True):
            assert_same_bits(new, old)


@pytest.mark.parametrize("dtype", DTYPES)
class ReduceSuite:
    """``Kernel.reduce``."""

    @pytest.mark.parametrize("num_sources", [1, 2, 5, 8])
    def test_reduce_sums_sources_and_squares(self, kernel, dtype, num_sources):
        arena = Arena(num_sources, dtype)
        before = [grad.copy() for grad in arena.grads]
        total = np.array(before).astype(np.float64).sum(axis=0)
        square_sums = np.full(2, np.nan)
        row = num_sources // 2
        apart = has_master(dtype)  # 16 bits cannot hold the sum
        out = np.empty(arena.numel, compute_dtype(dtype)) if apart else arena.grads[row]
        kernel.reduce(arena.grads, out, arena.whole, square_sums)
        expected = (total**2).reshape(2, -1).sum(axis=1)
        tolerance = TOLERANCE[compute_dtype(dtype)]
        np.testing.assert_allclose(square_sums, expected, rtol=10 * tolerance)
        np.testing.assert_allclose(out, total, atol=8 * tolerance)
        if not apart:
            before[row] = out
        for grad, kept in zip(arena.grads, before, strict=True):
            assert_same_bits(grad, kept)
        arena.guards.assert_untouched()

    def test_without_out_the_squares_are_the_same(self, kernel, dtype):
        arena, full = Arena(1, dtype), compute_dtype(dtype)
        before, widened = np.array(arena.grads), [grad.astype(full) for grad in arena.grads]
        measured, summed = np.full((2, 2), np.nan)
        kernel.reduce(arena.grads, None, arena.whole, measured)
        kernel.reduce(widened, widened[0], arena.whole, summed)
        np.testing.assert_array_equal(measured, summed)
        assert_same_bits(np.array(arena.grads).reshape(-1), before.reshape(-1))

    @pytest.mark.parametrize("num_sources", [1, 2, 3])
    def test_a_part_has_the_bits_of_the_whole(self, kernel, dtype, num_sources):
        arena, full = Arena(num_sources, dtype), compute_dtype(dtype)
        whole, part = np.empty(arena.numel, full), arena.guards.array(np.zeros(CHUNK_NUMEL, full))
        whole_squares, part_squares = np.empty(2), np.empty(1)
        kernel.reduce(arena.grads, whole, arena.whole, whole_squares)
        for number, span in enumerate(arena.whole.chunks(CHUNK_NUMEL)):
            kernel.reduce(arena.grads, part, span, part_squares)
            assert_same_bits(part, whole[span.slice])
            assert part_squares[0] == whole_squares[number]
        arena.guards.assert_untouched()

    @pytest.mark.parametrize("num_sources", [1, 2])
    @pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16", "float32"])
    def test_sums_travel_in_another_dtype(self, kernel, dtype, wire_dtype, num_sources):
        arena = Arena(num_sources, dtype)
        sums = np.zeros(arena.numel, compute_dtype(dtype))
        kernel.reduce(arena.grads, sums, arena.whole)
        wire = np.ones(arena.numel, wire_dtype)
        for span in arena.whole.chunks(CHUNK_NUMEL):
            kernel.reduce(arena.grads, wire[span.slice], span)
        kept = np.finfo(np.float32) if wire_dtype == "float32" else ml_dtypes.finfo(wire_dtype)
        np.testing.assert_allclose(wire.astype(np.float64), sums, float(kept.eps), 1e-7)
        arrived, square_sums = np.zeros_like(sums), np.zeros(2)
        kernel.reduce([wire], arrived, arena.whole, square_sums)
        np.testing.assert_array_equal(arrived, wire.astype(arrived.dtype))
        expected = (arrived.astype(np.float64) ** 2).reshape(2, -1).sum(axis=1)
        np.testing.assert_allclose(square_sums, expected, rtol=1e-6)

    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
    def test_squares_show_what_is_not_finite(self, kernel, dtype, poison):
        arena = Arena(2, dtype)
        arena.grads[0][arena.numel - 1] = poison
        square_sums = np.zeros(2)
        out = np.empty(arena.numel, compute_dtype(dtype))
        kernel.reduce(arena.grads, out, arena.whole, square_sums)
        assert np.isfinite(square_sums).tolist() == [True, False]


class WideSumSuite:
    """Sums that their sources could not hold: elements are widened before they are added."""

    @pytest.mark.parametrize("num_sources", [2, 3])
    @pytest.mark.parametrize(
        ("wire_dtype", "small"),
        [("bfloat16", 2.0**-30), ("float16", 2.0**-24), ("float32", 2.0**-30)],
    )
    def test_narrow_sources_are_added_in_float64(self, kernel, wire_dtype, small, num_sources):
        sources = [np.full(CHUNK_NUMEL, value, wire_dtype) for value in (1.0, small, small)]
        sources, out = sources[:num_sources], np.zeros(CHUNK_NUMEL)
        square_sums = np.zeros(1)
        kernel.reduce(sources, out, Span(0, CHUNK_NUMEL), square_sums)
        total = 1.0 + (num_sources - 1) * small
        assert (out == total).all()
        np.testing.assert_allclose(square_sums, CHUNK_NUMEL * total**2, rtol=1e-14)

    @pytest.mark.parametrize("num_sources", [2, 3])
    @pytest.mark.parametrize("dtype", SIXTEEN_BITS)
    def test_sixteen_bits_are_added_in_float32(self, kernel, dtype, num_sources):
        sources = [np.full(CHUNK_NUMEL, value, dtype) for value in (1.0, 2.0**-20, 2.0**-20)]
        sources, out = sources[:num_sources], np.zeros(CHUNK_NUMEL, np.float32)
        kernel.reduce(sources, out, Span(0, CHUNK_NUMEL))
        assert (out == np.float32(1.0 + (num_sources - 1) * 2.0**-20)).all()


@pytest.mark.parametrize("dtype", DTYPES)
class BitSuite:
    """For kernels that do not compute in float64: see [Note: the bits of a sum]."""

    @given(num_sources=st.integers(1, 17), seed=st.integers(0, 99))
    def test_bits_are_those_of_the_written_order(self, kernel, dtype, num_sources, seed):
        arena = Arena(num_sources, dtype, seed)
        rows = coefficient_rows(dtype, (3, 0.3), mean_scale=1 / 3, lr=0.01, weight_decay=0.1)
        c = rows[0]
        p, m, v = arena.in_full, arena.state["exp_avg"], arena.state["exp_avg_sq"]
        mean = c[11] * tree_sum([grad.astype(c.dtype) for grad in arena.grads])
        g = c[0] * mean + c[1] * p
        new_m = c[3] * m + c[4] * g
        new_v = c[5] * v + (c[6] * g) * g
        u = (c[7] * g + c[8] * new_m) / (np.sqrt(new_v * c[9]) + c[10])
        new_p = p - (c[2] * p + u)
        arena.update_all(kernel, rows)
        assert_same_bits(arena.in_full, new_p)
        assert_same_bits(arena.param, new_p.astype(dtype))
        assert_same_bits(arena.state["exp_avg"], new_m)
        assert_same_bits(arena.state["exp_avg_sq"], new_v)

    def test_an_average_kept_elsewhere_gives_the_same_update(self, kernel, dtype):
        fused, apart = Arena(3, dtype), Arena(3, dtype)
        segments = [[7, fused.numel - 5, 0]]
        fused.update(kernel, segments, coefficient_rows(dtype, (3, 0.3), mean_scale=1 / 3))
        means = np.empty(apart.numel, compute_dtype(dtype))
        kernel.reduce(apart.grads, means, apart.whole, factor=1 / 3)
        apart.grads = [means]
        apart.update(kernel, segments, coefficient_rows(dtype, (3, 0.3)))
        assert_equal_arenas(fused, apart)

    @given(cuts=st.lists(st.integers(1, 2 * CHUNK_NUMEL - 1), max_size=6, unique=True))
    def test_bits_do_not_depend_on_segments(self, kernel, dtype, cuts):
        whole, pieces = Arena(3, dtype), Arena(3, dtype)
        rows = coefficient_rows(dtype, (3, 0.3))
        whole.update_all(kernel, rows)
        edges = [0, *sorted(cuts), whole.numel]
        runs = [[a, b, 0] for a, b in itertools.pairwise(edges)]
        pieces.update(kernel, runs, rows)
        assert_equal_arenas(whole, pieces)

    @pytest.mark.parametrize("num_sources", [2, 3, 8])
    def test_reduced_sources_give_the_same_update(self, kernel, dtype, num_sources):
        fused, reduced = Arena(num_sources, dtype), Arena(num_sources, dtype)
        rows = coefficient_rows(dtype, (3, 0.3))
        fused.update_all(kernel, rows)
        out = None if has_master(dtype) else reduced.grads[1]
        kernel.reduce(reduced.grads, out, reduced.whole, np.zeros(2))
        reduced.grads = reduced.grads if out is None else [out]
        reduced.update_all(kernel, rows)
        assert_equal_arenas(fused, reduced)


def scale(kernel, param, master, factor=1.0):
    """Update parameters to ``factor`` times their values: 1 shows what is read and written."""
    numel = len(param)
    row = StepCoefficients(*[0.0] * NUM_COEFFICIENTS)._replace(param_decay=1.0 - factor, eps=1.0)
    plan = UpdatePlan(Span(0, numel), np.array([[0, numel, 0]]), np.array([row], np.float32))
    moments = np.zeros((2, numel), np.float32)
    state = {"exp_avg": moments[0], "exp_avg_sq": moments[1], "master": master}
    return kernel.update([np.zeros_like(param)], [param], state, plan)


def scaled(values):
    """Return what the formula makes of values with a factor of 1: 0 * inf is NaN."""
    return np.where(np.isinf(values), np.float32(np.nan), values)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
class MasterSuite:
    """For 16-bit parameters: see [Note: 16-bit parameters and masters]."""

    def test_every_written_parameter_is_followed_exactly(self, kernel, dtype):
        written = every_pattern(dtype)
        param, master = written.copy(), np.full(written.size, 0.1234567, np.float32)
        wide = cast(written, np.float32)
        wide[wide == master.astype(dtype).astype(np.float32)] = master[0]  # as if not written
        assert scale(kernel, param, master) != ALL_FINITE
        assert_same_bits(master, scaled(wide))
        assert_same_bits(param, cast(scaled(wide), dtype))

    def test_a_master_is_kept_while_it_rounds_to_its_parameter(self, kernel, dtype):
        values = hard_to_round(dtype)
        param, master = cast(values, dtype), values.copy()
        expected = scaled(values)
        scale(kernel, param, master)
        assert_same_bits(master, expected)
        assert_same_bits(param, cast(expected, dtype))

    def test_zeros_are_told_by_their_sign(self, kernel, dtype):
        tiny = np.float32(1e-45)
        param = np.tile(np.array([0.0, -0.0, 0.0, -0.0], dtype), CHUNK_NUMEL // 4)
        master = np.tile(np.array([-tiny, tiny, tiny, -tiny]), CHUNK_NUMEL // 4)
        scale(kernel, param, master)
        assert_same_bits(master[:4], np.array([0.0, -0.0, tiny, -tiny], np.float32))

    def test_a_nan_is_healed_by_writing_to_it(self, kernel, dtype):
        master = np.full(CHUNK_NUMEL, 0xFFFFFFFF, np.uint32).view(np.float32)  # rounded up: zero
        param = np.zeros(CHUNK_NUMEL, dtype)
        assert scale(kernel, param, master) == ALL_FINITE
        assert (master == 0).all()

    def test_a_parameter_too_large_for_its_dtype_is_told(self, kernel, dtype):
        overflows = np.float32(OVERFLOWS[dtype])
        master = np.full(3 * CHUNK_NUMEL, np.nextafter(overflows, np.float32(0)))
        assert scale(kernel, cast(master, dtype), master) == ALL_FINITE
        position = CHUNK_NUMEL + 77
        master[position] = overflows
        param = cast(master, dtype)
        flag = scale(kernel, param, master)
        assert flag <= position < flag + CHUNK_NUMEL
        assert np.flatnonzero(np.isinf(param)).tolist() == [position]
        assert np.isfinite(master).all()

    def test_small_updates_add_up(self, kernel, dtype):
        factor, numel = np.float32(1 - 1e-4), CHUNK_NUMEL
        param, master = np.ones(numel, dtype), np.ones(numel, np.float32)
        for _ in range(2000):
            scale(kernel, param, master, factor)
        expected = float(factor) ** 2000
        np.testing.assert_allclose(master, expected, rtol=1e-4)
        np.testing.assert_allclose(param.astype(np.float32), expected, rtol=EPS[dtype])
