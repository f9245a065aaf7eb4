"""Arrays to test kernels with: one shard, its sources and targets, and values that are hard."""

from collections.abc import Mapping, Sequence

import numpy as np

from shardopt.backends.base import Kernel, Rows, UpdatePlan
from shardopt.layout.dtypes import DTYPES, compute_dtype, has_master
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.layout.state_spec import state_specs
from shardopt.rule.coefficients import StepCount
from shardopt.rule.nadam import NAdam

SIXTEEN_BITS = [dtype for dtype in DTYPES if has_master(dtype)]

OVERFLOWS = {"float16": 65520.0, "bfloat16": 2.0**128 - 2.0**119}
"""The smallest number that is rounded to inf."""

_GUARD = 0x5A
_LINE_NBYTES = 64


def tree_sum(rows):
    """Sum in rank order as a pairwise tree: the left half has the largest power of two below."""
    if len(rows) == 1:
        return rows[0]
    half = 1 << (len(rows) - 1).bit_length() - 1
    return tree_sum(rows[:half]) + tree_sum(rows[half:])


def coefficient_rows(dtype, *step_counts, mean_scale=1.0, rule=NAdam, **hyper):
    """Return one row for each (step, mu_product), as the optimizer hands them to kernels."""
    rows = [rule(**hyper).coefficients(StepCount(*count), 1.0, mean_scale) for count in step_counts]
    return np.array(rows, compute_dtype(dtype))


def cast(values, dtype):
    """Convert as NumPy does, but warn neither of what becomes inf nor of NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype)


def every_pattern(dtype):
    """Return all values of a 16-bit dtype, NaNs included."""
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def hard_to_round(dtype):
    """Return ties between all neighbours, the float32s beside them, and a million random ones."""
    numbers = cast(every_pattern(dtype), np.float32)
    numbers = np.append(np.unique(numbers[np.isfinite(numbers)]), np.float32(OVERFLOWS[dtype]))
    ties = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(edge, np.float32(to)) for edge in (numbers, ties) for to in (-9e9, 9e9)]
    chosen = np.concatenate([numbers, ties, *beside, [-numbers[-1], np.inf, -np.inf, np.nan]])
    numel = -(-(len(chosen) + 1_000_000) // CHUNK_NUMEL) * CHUNK_NUMEL
    random = np.random.default_rng(0).integers(0, 1 << 32, numel - len(chosen), np.uint32)
    return np.concatenate([chosen.astype(np.float32), random.view(np.float32)])


def assert_same_bits(actual, expected):
    """Compare bit for bit, but take any NaN for any other."""
    assert actual.dtype == expected.dtype
    bits = f"uint{8 * expected.itemsize}"
    same = (actual.view(bits) == expected.view(bits)) | (np.isnan(actual) & np.isnan(expected))
    wrong = np.flatnonzero(~same)
    assert not wrong.size, (wrong[:9], actual[wrong[:9]], expected[wrong[:9]])


class HostKernel:
    """Calls a kernel with host arrays.

    To test a kernel that computes elsewhere, subclass this: bring the arrays there, call the
    kernel, and bring them back.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def update(self, sources: Sequence, targets: Sequence, state: Mapping, plan: UpdatePlan) -> int:
        """Call the kernel with arrays as sources and targets."""
        self.kernel.update(Rows.of(*sources), Rows.of(*targets), state, plan)
        return self.kernel.take_poisoned()

    def reduce(self, sources: Sequence, out, span: Span, square_sums=None, factor=1.0) -> None:
        """Call the kernel with arrays as sources."""
        self.kernel.reduce(Rows.of(*sources), out, span, square_sums, factor)


class Guarded:
    """Memory of arrays at odd distances from each other, with guard bytes around each."""

    def __init__(self) -> None:
        self._memory = []

    def array(self, values):
        """Return a copy of the values."""
        before = _LINE_NBYTES * (1 + 5 * len(self._memory) % 7)
        memory = np.full(before + values.nbytes + 2 * _LINE_NBYTES, _GUARD, np.uint8)
        start = before + -(memory.ctypes.data + before) % _LINE_NBYTES
        run = slice(start, start + values.nbytes)
        self._memory.append((memory, run))
        array = memory[run].view(values.dtype)
        array[:] = values
        return array

    def assert_untouched(self):
        """Fail if anything was written around the arrays."""
        for memory, run in self._memory:
            assert (memory[: run.start] == _GUARD).all()
            assert (memory[run.stop :] == _GUARD).all()


class Arena:
    """The arrays of one shard, of two chunks; those of equal seeds hold equal values.

    Attributes:
        grads: Arrays of the sources.
        params: Arrays of the targets, of which only the first holds the parameters.
        state: As kernels get it.
        guards: The memory of all.
    """

    def __init__(self, num_sources, dtype, seed=0, num_targets=1):
        rng = np.random.default_rng(seed)
        self.numel = 2 * CHUNK_NUMEL
        self.whole = Span(0, self.numel)
        self.guards = Guarded()
        full = compute_dtype(dtype)
        values = rng.standard_normal((num_sources, self.numel)).astype(dtype)
        self.grads = [self.guards.array(row) for row in values]
        param = rng.standard_normal(self.numel).astype(full)
        moments = rng.standard_normal((2, self.numel)).astype(full) * np.array([[1], [0.1]], full)
        arrays = zip(
            [each.key for each in state_specs(dtype)],
            (moments[0], moments[1] ** 2, param),
            strict=False,
        )
        self.state = {key: self.guards.array(array) for key, array in arrays}
        copies = [param.astype(dtype), *np.full((num_targets - 1, self.numel), np.nan, dtype)]
        self.params = [self.guards.array(copy) for copy in copies]

    @property
    def param(self):
        """The parameters."""
        return self.params[0]

    @property
    def in_full(self):
        """The parameters with all bits."""
        return self.state.get("master", self.params[0])

    def update(self, kernel, segments, coefficients, span=None):
        """Call the kernel and check that it wrote to nothing but the arrays."""
        table = np.array(segments, np.int64).reshape(-1, 3)
        plan = UpdatePlan(self.whole if span is None else span, table, coefficients)
        flag = kernel.update(self.grads, self.params, self.state, plan)
        self.guards.assert_untouched()
        return flag

    def update_all(self, kernel, coefficients, span=None):
        """Update with one segment that covers the shard."""
        return self.update(kernel, [[0, self.numel, 0]], coefficients, span)

    def written(self):
        """Return copies of all that an update writes."""
        return [array.copy() for array in (*self.params, *self.state.values())]


def assert_equal_arenas(one, other):
    """Compare what an update writes, bit for bit."""
    for left, right in zip(one.written(), other.written(), strict=True):
        assert_same_bits(left, right)
