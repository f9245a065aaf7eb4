"""Values and segments that are hard for a kernel, and comparisons with the kernel for CPUs."""

import numpy as np

from shardopt.backends.base import ALL_FINITE, UpdatePlan
from shardopt.backends.cpu.kernel import CpuKernel
from shardopt.layout.dtypes import compute_dtype, has_master
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.rule.coefficients import NUM_COEFFICIENTS, StepCoefficients
from shardopt.rule.rules import RULES
from tests.support.kernel_arrays import (
    OVERFLOWS,
    Arena,
    HostKernel,
    assert_equal_arenas,
    assert_same_bits,
    cast,
    coefficient_rows,
)

CPU = HostKernel(CpuKernel())

_DECADES = {"float16": (-8, 3), "bfloat16": (-40, 12), "float32": (-44, 12), "float64": (-320, 15)}
"""Of gradients; the least are subnormal."""

_LENGTHS = (1, 5, 32, 64, 33, 95, 1000, 7, 2048, 3333, 31)
_GAPS = (0, 3, 0, 11, 200)


def spread(rng, numel, low, high, dtype):
    """Return numbers of both signs, and of all sizes between two powers of ten."""
    with np.errstate(under="ignore"):
        values = rng.standard_normal(numel) * 10.0 ** rng.uniform(low, high, numel)
    values[rng.integers(0, numel, 40)] = 0.0
    values[rng.integers(0, numel, 40)] = -0.0
    return cast(values, dtype)


def hard_arena(num_sources, dtype, num_targets=1, grad_dtype=None, poison=None):
    """Return an arena with numbers of all sizes; ``poison`` is in the second chunk of a source."""
    rng = np.random.default_rng(num_sources)
    arena = Arena(num_sources, dtype, num_targets=num_targets)
    numel, full, grad_dtype = arena.numel, compute_dtype(dtype), grad_dtype or dtype
    arena.grads = [
        arena.guards.array(spread(rng, numel, *_DECADES[grad_dtype], grad_dtype))
        for _ in range(num_sources)
    ]
    if poison is not None:
        arena.grads[-1][CHUNK_NUMEL + 77] = poison
    smallest = -318 if full == "float64" else -44
    arena.param[:] = spread(rng, numel, -4, 2, dtype)
    arena.state["exp_avg"][:] = spread(rng, numel, smallest / 2, 2, full)
    arena.state["exp_avg_sq"][:] = np.abs(spread(rng, numel, smallest, 3, full))
    arena.state["exp_avg_sq"][rng.integers(0, numel, 40)] = np.inf
    if has_master(dtype):
        masters = arena.param.astype(np.float32)
        masters *= 1 + np.float32(1e-4) * rng.standard_normal(numel).astype(np.float32)
        masters[rng.integers(0, numel, 60)] *= np.float32(1.5)  # as if parameters were written
        arena.state["master"][:] = masters
    return arena


def hard_segments(numel, num_cohorts):
    """Return segments of many lengths, with gaps and without, that begin and end anywhere."""
    segments, start = [], 0
    while start < numel:
        number = len(segments)
        stop = min(start + _LENGTHS[number % len(_LENGTHS)], numel)
        segments.append([start, stop, number % num_cohorts])
        start = stop + _GAPS[number % len(_GAPS)]
    return segments


def hard_coefficients(dtype, eps=1e-8):
    """Return cohorts of NAdam, with L2, decoupled and no weight decay, and then of other rules.

    ``eps`` is NAdam's. The other cohorts divide by 1 with no second moment (RAdam's first steps),
    and have eps in other places; the moments of ``hard_arena`` have some that have overflowed.
    """
    rows = np.concatenate(
        [
            coefficient_rows(dtype, (1, 0.5), mean_scale=1 / 3, lr=0.01, weight_decay=0.1),
            coefficient_rows(
                dtype, (7, 0.1), lr=0.01, weight_decay=0.1, decoupled_weight_decay=True
            ),
            coefficient_rows(dtype, (300, 1e-3), lr=1e-3),
        ]
    )
    rows[:, StepCoefficients._fields.index("eps")] = eps
    others = [
        coefficient_rows(dtype, (1,), (99,), rule=RULES["RAdam"], mean_scale=1 / 3, lr=0.1),
        coefficient_rows(dtype, (3,), rule=RULES["Adam"], lr=0.01, variant="keras"),
        coefficient_rows(dtype, (2,), rule=RULES["AdamW"], lr=0.01, weight_decay=0.1),
    ]
    return np.concatenate([rows, *others])


def assert_same_update(kernel, make_arena, eps=1e-8, segments=None):
    """Compare an update with that of the kernel for CPUs, bit for bit."""
    ours, theirs = make_arena(), make_arena()
    dtype = ours.param.dtype.name
    rows = hard_coefficients(dtype, eps)
    table = hard_segments(ours.numel, len(rows)) if segments is None else segments
    found, expected = (
        arena.update(each, table, rows) for arena, each in ((ours, kernel), (theirs, CPU))
    )
    assert_equal_arenas(ours, theirs)
    assert chunk_of(found) == chunk_of(expected)


def assert_same_reduction(kernel, grads, out_dtype, factor=1.0, span=None):
    """Compare a reduction with that of the kernel for CPUs, bit for bit."""
    span = span or Span(0, len(grads[0]))
    results = []
    for each in (kernel, CPU):
        square_sums = np.full(span.numel // CHUNK_NUMEL, np.nan)
        out = None if out_dtype is None else np.zeros(span.numel, out_dtype)
        each.reduce(grads, out, span, square_sums, factor)
        results.append((out, square_sums))
    (out, square_sums), (expected, expected_sums) = results
    assert_same_bits(square_sums, expected_sums)
    if out is not None:
        assert_same_bits(out, expected)


def assert_overflow_is_told(kernel, dtype):
    """Check that a parameter becoming inf is told even if its master is finite."""
    arena, rows = Arena(1, dtype), np.zeros((1, NUM_COEFFICIENTS), np.float32)
    eps = StepCoefficients._fields.index("eps")
    rows[0, eps] = 1.0  # the only one that must not be zero; no master changes
    for array in (arena.grads[0], arena.state["exp_avg"], arena.state["exp_avg_sq"]):
        array[:] = 0
    master, position = arena.state["master"], CHUNK_NUMEL + 77
    master[:] = np.nextafter(np.float32(OVERFLOWS[dtype]), np.float32(0))
    arena.param[:] = cast(master, dtype)
    assert arena.update_all(kernel, rows) == ALL_FINITE
    master[position] = OVERFLOWS[dtype]
    arena.param[:] = cast(master, dtype)
    assert chunk_of(arena.update_all(kernel, rows)) == 1
    assert np.isfinite(master).all()


def assert_flat_index_is_told(kernel, dtype):
    """Check that the start of the poisoned chunk is told in the flat index space, and once."""
    arena = Arena(1, dtype)
    segments, rows = np.array([[0, arena.numel, 0]]), coefficient_rows(dtype, (3, 0.3))
    plan = UpdatePlan(arena.whole, segments, rows, origin=7 * CHUNK_NUMEL)
    assert kernel.update(arena.grads, arena.params, arena.state, plan) == ALL_FINITE
    arena.grads[0][CHUNK_NUMEL + 99] = np.inf
    found = kernel.update(arena.grads, arena.params, arena.state, plan)
    assert found == 8 * CHUNK_NUMEL
    assert kernel.kernel.take_poisoned() == ALL_FINITE


def chunk_of(position):
    """Return the chunk of a position, or ``ALL_FINITE``."""
    return position if position == ALL_FINITE else position // CHUNK_NUMEL
