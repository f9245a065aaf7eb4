"""What every kernel promises; a test file for a kernel subclasses these."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardopt.backends.base import ALL_FINITE, UpdatePlan
from shardopt.layout.dtypes import DTYPES, compute_dtype, has_master
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.rule.nadam import (
    NUM_COEFFICIENTS,
    Hyperparams,
    StepCoefficients,
    StepCount,
    step_coefficients,
)
from tests.support.reference import PaperNAdam

TOLERANCE = {"float32": 2e-6, "float64": 1e-14}
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
SIXTEEN_BITS = [dtype for dtype in DTYPES if has_master(dtype)]

OVERFLOWS = {"float16": 65520.0, "bfloat16": 2.0**128 - 2.0**119}
"""The smallest number that is rounded to inf."""


def tree_sum(rows):
    """Sum in rank order as a pairwise tree: the left half has the largest power of two below."""
    if len(rows) == 1:
        return rows[0]
    half = 1 << (len(rows) - 1).bit_length() - 1
    return tree_sum(rows[:half]) + tree_sum(rows[half:])


def coefficient_rows(dtype, *step_counts, **hyper):
    """One row for each (step, mu_product), as the optimizer hands them to kernels."""
    rows = [
        step_coefficients(Hyperparams(**hyper), StepCount(*clock), 1.0) for clock in step_counts
    ]
    return np.array(rows, compute_dtype(dtype))


def cast(values, dtype):
    """NumPy's conversion, which warns neither of what becomes inf nor of NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype)


def every_pattern(dtype):
    """All values of a 16-bit dtype, NaNs included."""
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def assert_same_bits(actual, expected):
    """Compare bit for bit, but take any NaN for any other."""
    assert actual.dtype == expected.dtype
    bits = f"uint{8 * expected.itemsize}"
    same = (actual.view(bits) == expected.view(bits)) | (np.isnan(actual) & np.isnan(expected))
    wrong = np.flatnonzero(~same)
    assert not wrong.size, (wrong[:9], actual[wrong[:9]], expected[wrong[:9]])


class Arena:
    """The arrays of one region of three chunks, of which the rank owns the last two."""

    def __init__(self, num_sources, dtype, seed=0):
        rng = np.random.default_rng(seed)
        self.numel, self.start = 3 * CHUNK_NUMEL, CHUNK_NUMEL
        self.grads = rng.standard_normal((num_sources, self.numel)).astype(dtype)
        self.param = rng.standard_normal(self.numel).astype(dtype)
        full = compute_dtype(dtype)
        self.exp_avg = rng.standard_normal(2 * CHUNK_NUMEL).astype(full)
        self.exp_avg_sq = rng.standard_normal(2 * CHUNK_NUMEL).astype(full) ** 2
        self.master = None
        if has_master(dtype):
            self.master = rng.standard_normal(2 * CHUNK_NUMEL).astype(full)
            self.param[self.start :] = self.master.astype(dtype)

    def update(self, kernel, segments, coefficients):
        table = np.array(segments, np.int64).reshape(-1, 3)
        plan = UpdatePlan(self.start, self.numel, table, coefficients)
        return kernel.update(
            self.grads, self.param, self.master, self.exp_avg, self.exp_avg_sq, plan
        )

    def in_full(self):
        """What the rank owns of the parameters, with all bits."""
        return self.param[self.start :] if self.master is None else self.master

    def arrays(self):
        present = [self.param, self.exp_avg, self.exp_avg_sq, self.master]
        return [array.copy() for array in present if array is not None]


@pytest.mark.parametrize("dtype", DTYPES)
class KernelSuite:
    """Subclasses give a fixture ``kernel``."""

    @pytest.mark.parametrize("num_sources", [1, 2, 3, 4, 7])
    @pytest.mark.parametrize("variant", ["torch", "keras", "optax", "lucid"])
    def test_update_follows_the_paper(self, kernel, dtype, num_sources, variant):
        arena = Arena(num_sources, dtype)
        arena.exp_avg[:] = arena.exp_avg_sq[:] = 0
        hyper = {"variant": variant, "weight_decay": 0.1, "lr": 0.01}
        owned = slice(arena.start, None)
        paper = PaperNAdam(arena.in_full(), **hyper)
        clock = StepCount()
        for step in range(3):
            arena.grads[:] = np.random.default_rng(step).standard_normal(arena.grads.shape)
            paper.step(arena.grads[:, owned].astype(np.float64).sum(axis=0))
            clock.advance(Hyperparams(**hyper))
            rows = coefficient_rows(dtype, (clock.step, clock.mu_product), **hyper)
            assert arena.update(kernel, [[arena.start, arena.numel, 0]], rows) == ALL_FINITE
        bound = 10 * TOLERANCE[compute_dtype(dtype)]
        tolerance = {"rtol": bound, "atol": bound}
        np.testing.assert_allclose(arena.in_full(), paper.param, **tolerance)
        np.testing.assert_allclose(arena.exp_avg, paper.exp_avg, **tolerance)
        np.testing.assert_allclose(arena.exp_avg_sq, paper.exp_avg_sq, **tolerance)
        assert_same_bits(arena.param[owned], arena.in_full().astype(dtype))

    def test_only_segments_are_written(self, kernel, dtype):
        arena = Arena(2, dtype)
        before = arena.arrays()
        segments = [[arena.start + 5, arena.start + 9, 0], [arena.start + 5000, arena.numel - 1, 1]]
        arena.update(kernel, segments, coefficient_rows(dtype, (1, 0.5), (7, 0.1), lr=0.5))
        written = np.zeros(arena.numel, bool)
        for start, stop, _ in segments:
            written[start:stop] = True
        for old, new in zip(before, arena.arrays(), strict=True):
            mask = written[-len(old) :]  # of the region, or of what the rank owns
            share = (old[mask] != new[mask]).mean()  # small changes are rounded off 16 bits
            assert share > 0.9 if has_master(dtype) else share == 1
            np.testing.assert_array_equal(old[~mask], new[~mask])

    def test_each_segment_has_its_coefficients(self, kernel, dtype):
        rows = coefficient_rows(dtype, (1, 0.5), (7, 0.1))
        split, first, second = (Arena(1, dtype) for _ in range(3))
        middle = split.start + 4321
        split.update(kernel, [[split.start, middle, 0], [middle, split.numel, 1]], rows)
        first.update(kernel, [[first.start, first.numel, 0]], rows)
        second.update(kernel, [[second.start, second.numel, 1]], rows)
        np.testing.assert_array_equal(split.in_full()[:4321], first.in_full()[:4321])
        np.testing.assert_array_equal(split.in_full()[4321:], second.in_full()[4321:])

    @pytest.mark.parametrize("poison", [np.nan, np.inf])
    def test_what_is_not_finite_is_told(self, kernel, dtype, poison):
        arena = Arena(2, dtype)
        position = arena.start + CHUNK_NUMEL + 77
        arena.grads[1, position] = poison
        rows = coefficient_rows(dtype, (1, 0.5))
        flag = arena.update(kernel, [[arena.start, arena.numel, 0]], rows)
        assert flag != ALL_FINITE
        assert flag <= position < flag + CHUNK_NUMEL
        assert np.flatnonzero(~np.isfinite(arena.param)).tolist() == [position]

    @pytest.mark.parametrize("num_sources", [1, 2, 5, 8])
    def test_reduce_sums_sources_and_squares(self, kernel, dtype, num_sources):
        arena = Arena(num_sources, dtype)
        before = arena.grads.copy()
        total = before[:, arena.start :].astype(np.float64).sum(axis=0)
        square_sums = np.full(2, np.nan)
        row = num_sources // 2
        out = None if has_master(dtype) else arena.grads[row, arena.start :]
        kernel.reduce(arena.grads, out, arena.start, arena.numel, square_sums)
        expected = (total**2).reshape(2, -1).sum(axis=1)
        tolerance = TOLERANCE[compute_dtype(dtype)]
        np.testing.assert_allclose(square_sums, expected, rtol=10 * tolerance)
        if out is not None:
            np.testing.assert_allclose(out, total, atol=8 * tolerance)
            before[row, arena.start :] = out
        assert_same_bits(arena.grads, before)

    @pytest.mark.parametrize("num_sources", [1, 3])
    def test_without_out_the_squares_are_the_same(self, kernel, dtype, num_sources):
        arena, full = Arena(num_sources, dtype), compute_dtype(dtype)
        before, widened = arena.grads.copy(), arena.grads.astype(full)
        measured, summed = np.full((2, 2), np.nan)
        kernel.reduce(arena.grads, None, arena.start, arena.numel, measured)
        kernel.reduce(widened, widened[0, arena.start :], arena.start, arena.numel, summed)
        np.testing.assert_array_equal(measured, summed)
        assert_same_bits(arena.grads, before)

    @pytest.mark.parametrize("num_sources", [1, 2])
    @pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16", "float32"])
    def test_sums_travel_in_another_dtype(self, kernel, dtype, wire_dtype, num_sources):
        arena = Arena(num_sources, dtype)
        sums = np.zeros(2 * CHUNK_NUMEL, compute_dtype(dtype))
        kernel.reduce(arena.grads, sums, arena.start, arena.numel, None)
        wire = np.ones((2, CHUNK_NUMEL), wire_dtype)
        for half, start in zip(wire, (arena.start, arena.start + CHUNK_NUMEL), strict=True):
            kernel.reduce(arena.grads, half, start, start + CHUNK_NUMEL, None)
        kept = np.finfo(np.float32) if wire_dtype == "float32" else ml_dtypes.finfo(wire_dtype)
        np.testing.assert_allclose(wire.astype(np.float64).reshape(-1), sums, float(kept.eps), 1e-7)
        arrived, square_sums = np.zeros_like(sums), np.zeros(2)
        kernel.reduce(wire.reshape(1, -1), arrived, 0, 2 * CHUNK_NUMEL, square_sums)
        np.testing.assert_array_equal(arrived, wire.astype(arrived.dtype).reshape(-1))
        expected = (arrived.astype(np.float64) ** 2).reshape(2, -1).sum(axis=1)
        np.testing.assert_allclose(square_sums, expected, rtol=1e-6)

    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
    def test_squares_tell_what_is_not_finite(self, kernel, dtype, poison):
        arena = Arena(2, dtype)
        arena.grads[0, arena.numel - 1] = poison
        square_sums = np.zeros(2)
        out = None if has_master(dtype) else arena.grads[0, arena.start :]
        kernel.reduce(arena.grads, out, arena.start, arena.numel, square_sums)
        assert np.isfinite(square_sums).tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
class BitSuite:
    """For kernels that do not compute in float64: see [Note: the bits of a sum]."""

    @given(num_sources=st.integers(1, 17), seed=st.integers(0, 99))
    def test_bits_are_those_of_the_written_order(self, kernel, dtype, num_sources, seed):
        arena = Arena(num_sources, dtype, seed)
        rows = coefficient_rows(dtype, (3, 0.3), lr=0.01, weight_decay=0.1)
        c = rows[0]
        p, m, v = arena.in_full(), arena.exp_avg, arena.exp_avg_sq
        grads = arena.grads[:, arena.start :].astype(c.dtype)
        g = c[0] * tree_sum(list(grads)) + c[1] * p
        new_m = c[3] * m + c[4] * g
        new_v = c[5] * v + (c[6] * g) * g
        u = (c[7] * g + c[8] * new_m) / (np.sqrt(new_v * c[9]) + c[10])
        new_p = p - (c[2] * p + u)
        arena.update(kernel, [[arena.start, arena.numel, 0]], rows)
        assert_same_bits(arena.in_full(), new_p)
        assert_same_bits(arena.param[arena.start :], new_p.astype(dtype))
        assert_same_bits(arena.exp_avg, new_m)
        assert_same_bits(arena.exp_avg_sq, new_v)

    def test_a_sum_kept_elsewhere_gives_the_same_update(self, kernel, dtype):
        fused, apart = Arena(2, dtype), Arena(2, dtype)
        rows = coefficient_rows(dtype, (3, 0.3))
        segments = [[fused.start + 7, fused.numel - 5, 0]]
        fused.update(kernel, segments, rows)
        sums = np.empty((1, CHUNK_NUMEL * 2), compute_dtype(dtype))
        kernel.reduce(apart.grads, sums[0], apart.start, apart.numel, None)
        table = np.array(segments, np.int64).reshape(-1, 3)
        plan = UpdatePlan(apart.start, apart.numel, table, rows, sources_start=apart.start)
        kernel.update(sums, apart.param, apart.master, apart.exp_avg, apart.exp_avg_sq, plan)
        for one, other in zip(fused.arrays(), apart.arrays(), strict=True):
            np.testing.assert_array_equal(one, other)

    @given(cuts=st.lists(st.integers(1, 2 * CHUNK_NUMEL - 1), max_size=6, unique=True))
    def test_bits_do_not_depend_on_segments(self, kernel, dtype, cuts):
        whole, pieces = Arena(3, dtype), Arena(3, dtype)
        rows = coefficient_rows(dtype, (3, 0.3))
        whole.update(kernel, [[whole.start, whole.numel, 0]], rows)
        edges = [whole.start, *(whole.start + cut for cut in sorted(cuts)), whole.numel]
        runs = [[a, b, 0] for a, b in zip(edges, edges[1:], strict=False)]
        pieces.update(kernel, runs, rows)
        for one, other in zip(whole.arrays(), pieces.arrays(), strict=True):
            np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize("num_sources", [2, 3, 8])
    def test_reduced_sources_give_the_same_update(self, kernel, dtype, num_sources):
        fused, reduced = Arena(num_sources, dtype), Arena(num_sources, dtype)
        rows = coefficient_rows(dtype, (3, 0.3))
        fused.update(kernel, [[fused.start, fused.numel, 0]], rows)
        mine = None if has_master(dtype) else reduced.grads[1:2]
        out = None if mine is None else mine[0, reduced.start :]
        kernel.reduce(reduced.grads, out, reduced.start, reduced.numel, np.zeros(2))
        reduced.grads = reduced.grads if mine is None else mine
        reduced.update(kernel, [[reduced.start, reduced.numel, 0]], rows)
        for one, other in zip(fused.arrays(), reduced.arrays(), strict=True):
            np.testing.assert_array_equal(one, other)


def scale(kernel, param, master, factor=1.0):
    """Update parameters to ``factor`` times what they are: 1 shows what is read and written."""
    numel = len(param)
    row = StepCoefficients(*[0.0] * NUM_COEFFICIENTS)._replace(param_decay=1.0 - factor, eps=1.0)
    plan = UpdatePlan(0, numel, np.array([[0, numel, 0]]), np.array([row], np.float32))
    grads, (exp_avg, exp_avg_sq) = np.zeros_like(param)[None], np.zeros((2, numel), np.float32)
    return kernel.update(grads, param, master, exp_avg, exp_avg_sq, plan)


def scaled(values):
    """What formulas make of values with a factor of 1: 0 * inf is NaN."""
    return np.where(np.isinf(values), np.float32(np.nan), values)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
class MasterSuite:
    """For 16-bit parameters: see [Note: sixteen bits and a master]."""

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


def hard_to_round(dtype):
    """Ties between all neighbours, the float32s beside them, and a million random bit patterns."""
    numbers = cast(every_pattern(dtype), np.float32)
    numbers = np.append(np.unique(numbers[np.isfinite(numbers)]), np.float32(OVERFLOWS[dtype]))
    ties = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(edge, np.float32(to)) for edge in (numbers, ties) for to in (-9e9, 9e9)]
    chosen = np.concatenate([numbers, ties, *beside, [-numbers[-1], np.inf, -np.inf, np.nan]])
    numel = -(-(len(chosen) + 1_000_000) // CHUNK_NUMEL) * CHUNK_NUMEL
    random = np.random.default_rng(0).integers(0, 1 << 32, numel - len(chosen), np.uint32)
    return np.concatenate([chosen.astype(np.float32), random.view(np.float32)])
