"""What every kernel promises; a test file for a kernel subclasses these."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardopt.kernels.base import ALL_FINITE, UpdatePlan
from shardopt.nadam import Clock, Hyperparams, step_coefficients
from shardopt.partition import CHUNK_NUMEL
from tests.paper import PaperNAdam

TOLERANCE = {"float32": 2e-6, "float64": 1e-14}


def tree_sum(rows):
    """Sum in rank order as a pairwise tree: the left half has the largest power of two below."""
    if len(rows) == 1:
        return rows[0]
    half = 1 << (len(rows) - 1).bit_length() - 1
    return tree_sum(rows[:half]) + tree_sum(rows[half:])


def coefficient_rows(dtype, *clocks, **hyper):
    """One row for each (step, mu_product), as the optimizer hands them to kernels."""
    rows = [step_coefficients(Hyperparams(**hyper), Clock(*clock), 1.0) for clock in clocks]
    return np.array(rows, dtype)


class Arena:
    """The arrays of one section of three chunks, of which the rank owns the last two."""

    def __init__(self, num_sources, dtype, seed=0):
        rng = np.random.default_rng(seed)
        self.numel, self.start = 3 * CHUNK_NUMEL, CHUNK_NUMEL
        self.grads = rng.standard_normal((num_sources, self.numel)).astype(dtype)
        self.param = rng.standard_normal(self.numel).astype(dtype)
        self.exp_avg = rng.standard_normal(2 * CHUNK_NUMEL).astype(dtype)
        self.exp_avg_sq = rng.standard_normal(2 * CHUNK_NUMEL).astype(dtype) ** 2

    def update(self, kernel, segments, coefficients):
        table = np.array(segments, np.int64).reshape(-1, 3)
        plan = UpdatePlan(self.start, self.numel, table, coefficients)
        return kernel.update(self.grads, self.param, self.exp_avg, self.exp_avg_sq, plan)

    def arrays(self):
        return [self.param.copy(), self.exp_avg.copy(), self.exp_avg_sq.copy()]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
class KernelSuite:
    """Subclasses give a fixture ``kernel``."""

    @pytest.mark.parametrize("num_sources", [1, 2, 3, 4, 7])
    @pytest.mark.parametrize("variant", ["torch", "keras", "optax", "lucid"])
    def test_update_follows_the_paper(self, kernel, dtype, num_sources, variant):
        arena = Arena(num_sources, dtype)
        arena.exp_avg[:] = arena.exp_avg_sq[:] = 0
        hyper = {"variant": variant, "weight_decay": 0.1, "lr": 0.01}
        paper = PaperNAdam(arena.param, **hyper)
        clock = Clock()
        for step in range(3):
            arena.grads[:] = np.random.default_rng(step).standard_normal(arena.grads.shape)
            paper.step(arena.grads.astype(np.float64).sum(axis=0))
            clock.advance(Hyperparams(**hyper))
            rows = coefficient_rows(dtype, (clock.step, clock.mu_product), **hyper)
            assert arena.update(kernel, [[arena.start, arena.numel, 0]], rows) == ALL_FINITE
        owned = slice(arena.start, None)
        tolerance = {"rtol": 10 * TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
        np.testing.assert_allclose(arena.param[owned], paper.param[owned], **tolerance)
        np.testing.assert_allclose(arena.exp_avg, paper.exp_avg[owned], **tolerance)
        np.testing.assert_allclose(arena.exp_avg_sq, paper.exp_avg_sq[owned], **tolerance)

    def test_only_segments_are_written(self, kernel, dtype):
        arena = Arena(2, dtype)
        before = arena.arrays()
        segments = [[arena.start + 5, arena.start + 9, 0], [arena.start + 5000, arena.numel - 1, 1]]
        arena.update(kernel, segments, coefficient_rows(dtype, (1, 0.5), (7, 0.1)))
        written = np.zeros(arena.numel, bool)
        for start, stop, _ in segments:
            written[start:stop] = True
        owned = written[arena.start :]
        for old, new, mask in zip(before, arena.arrays(), [written, owned, owned], strict=True):
            assert (old[mask] != new[mask]).all()
            np.testing.assert_array_equal(old[~mask], new[~mask])

    def test_each_segment_has_its_coefficients(self, kernel, dtype):
        rows = coefficient_rows(dtype, (1, 0.5), (7, 0.1))
        split, first, second = (Arena(1, dtype) for _ in range(3))
        middle = split.start + 4321
        split.update(kernel, [[split.start, middle, 0], [middle, split.numel, 1]], rows)
        first.update(kernel, [[first.start, first.numel, 0]], rows)
        second.update(kernel, [[second.start, second.numel, 1]], rows)
        np.testing.assert_array_equal(split.param[:middle], first.param[:middle])
        np.testing.assert_array_equal(split.param[middle:], second.param[middle:])

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
        total = arena.grads.astype(np.float64).sum(axis=0)
        square_sums = np.full(2, np.nan)
        mine = arena.grads[num_sources // 2]
        others = arena.grads[:, : arena.start].copy()
        kernel.reduce(arena.grads, mine, arena.start, arena.numel, square_sums)
        expected = (total[arena.start :] ** 2).reshape(2, -1).sum(axis=1)
        tolerance = TOLERANCE[dtype]
        np.testing.assert_allclose(square_sums, expected, rtol=10 * tolerance)
        np.testing.assert_allclose(mine[arena.start :], total[arena.start :], atol=8 * tolerance)
        np.testing.assert_array_equal(arena.grads[:, : arena.start], others)

    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
    def test_squares_tell_what_is_not_finite(self, kernel, dtype, poison):
        arena = Arena(2, dtype)
        arena.grads[0, arena.numel - 1] = poison
        square_sums = np.zeros(2)
        kernel.reduce(arena.grads, arena.grads[0], arena.start, arena.numel, square_sums)
        assert np.isfinite(square_sums).tolist() == [True, False]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
class BitSuite:
    """For kernels that compute in the parameters' dtype: see [Note: the bits of a sum]."""

    @given(num_sources=st.integers(1, 17), seed=st.integers(0, 99))
    def test_bits_are_those_of_the_written_order(self, kernel, dtype, num_sources, seed):
        arena = Arena(num_sources, dtype, seed)
        rows = coefficient_rows(dtype, (3, 0.3), lr=0.01, weight_decay=0.1)
        c = rows[0]
        p, m, v = arena.param[arena.start :], arena.exp_avg, arena.exp_avg_sq
        g = c[0] * tree_sum(list(arena.grads[:, arena.start :])) + c[1] * p
        new_m = c[3] * m + c[4] * g
        new_v = c[5] * v + (c[6] * g) * g
        new_p = c[2] * p - (c[7] * g + c[8] * new_m) / (np.sqrt(new_v * c[9]) + c[10])
        arena.update(kernel, [[arena.start, arena.numel, 0]], rows)
        np.testing.assert_array_equal(arena.param[arena.start :], new_p)
        np.testing.assert_array_equal(arena.exp_avg, new_m)
        np.testing.assert_array_equal(arena.exp_avg_sq, new_v)

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
        mine = reduced.grads[1:2]
        kernel.reduce(reduced.grads, mine[0], reduced.start, reduced.numel, np.zeros(2))
        reduced.grads = mine
        reduced.update(kernel, [[reduced.start, reduced.numel, 0]], rows)
        for one, other in zip(fused.arrays(), reduced.arrays(), strict=True):
            np.testing.assert_array_equal(one, other)
