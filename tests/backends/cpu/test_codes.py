"""The CPU kernel with states of 8 bits and without masters, beside the one in float64."""

import numpy as np
import pytest

from shardopt.backends.base import ALL_FINITE, Rows, UpdatePlan
from shardopt.backends.codes import decode, encode, shaped
from shardopt.backends.cpu.kernel import CpuKernel
from shardopt.backends.reference import ReferenceKernel
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.layout.state_spec import StateForm, state_specs
from shardopt.rule.coefficients import StepCoefficients, StepCount
from shardopt.rule.nadam import NAdam
from shardopt.rule.rounding import Chance

NUMEL = 4 * CHUNK_NUMEL
WHOLE = Span(0, NUMEL)
SEGMENTS = [[0, 5000, 0], [5120, 5121, 1], [2 * CHUNK_NUMEL, NUMEL - 256, 0]]
INSIDE = np.zeros(NUMEL, bool)
for _start, _stop, _ in SEGMENTS:
    INSIDE[_start:_stop] = True
CHANCE = Chance(np.array([11, 12, 13], np.uint64), np.array([0, 768, (1 << 32) - 1280], np.int64))
CASES = [
    ("float32", StateForm(8)),
    ("bfloat16", StateForm(8)),
    ("float16", StateForm(8)),
    ("bfloat16", StateForm(8, has_masters=False)),
    ("bfloat16", StateForm(32, has_masters=False)),
]
ALL = pytest.mark.parametrize(
    ("dtype", "form"), CASES, ids=[f"{d}-{f.optim_bits}-{f.has_masters}" for d, f in CASES]
)
COEFFICIENTS = np.array(
    [
        NAdam(weight_decay=0.1).coefficients(StepCount(7, 0.4), 0.5, 1 / 3),
        NAdam(lr=0.1, decoupled_weight_decay=True).coefficients(StepCount(2, 0.8), 1.0),
    ],
    np.float32,
)


class Shard:
    """Gradients, parameters and state of one shard."""

    def __init__(self, dtype, form, num_sources=1, seed=0, scale=1.0):
        rng = np.random.default_rng(seed)
        self.grads = [rng.standard_normal(NUMEL).astype(dtype) for _ in range(num_sources)]
        self.param = rng.standard_normal(NUMEL).astype(dtype)
        self.specs = state_specs(dtype, form)
        values = {
            "exp_avg": scale * rng.standard_normal(NUMEL),
            "exp_avg_sq": scale * rng.standard_normal(NUMEL) ** 2 / 10,
            "master": self.param,
        }
        self.state = {}
        for spec in self.specs:
            array = np.zeros(spec.nbytes(NUMEL), np.uint8).view(spec.dtype)
            self.state[spec.key] = array = shaped(array, spec)
            if spec.codec is None:
                array[:] = values[spec.key]
            else:
                encode(values[spec.key].astype(np.float32), array, spec.codec)
                array[:, 4:] *= INSIDE.reshape(-1, 256)  # as behind the ends of parameters

    def update(
        self,
        kernel,
        spans=(WHOLE,),
        segments=SEGMENTS,
        chance=CHANCE,
        coefficients=COEFFICIENTS,
    ):
        table = np.array(segments, np.int64).reshape(-1, 3)
        for span in spans:
            plan = UpdatePlan(span, table, coefficients, chance=chance)
            kernel.update(Rows.of(*self.grads), Rows.of(self.param), self.state, plan)
        return kernel.take_poisoned()

    def values(self, key):
        spec = next(spec for spec in self.specs if spec.key == key)
        array = self.state[key]
        return array if spec.codec is None else decode(array, spec.codec, NUMEL)

    def bits(self):
        return [self.param.tobytes(), *(array.tobytes() for array in self.state.values())]


@ALL
@pytest.mark.parametrize("num_sources", [1, 3])
def test_results_are_those_of_the_reference_but_for_the_last_digit(dtype, form, num_sources):
    ours, theirs = (Shard(dtype, form, num_sources) for _ in range(2))
    assert ours.update(CpuKernel()) == ALL_FINITE
    theirs.update(ReferenceKernel())
    for key in ours.state:
        mine, other = ours.state[key], theirs.state[key]
        if mine.ndim == 1:
            np.testing.assert_allclose(mine, other, rtol=2e-5, atol=1e-6)
            continue
        mine, other = ours.values(key), theirs.values(key)
        # A value at the edge of two levels may fall on either side.
        np.testing.assert_allclose(mine, other, rtol=0.13, atol=1e-4)
        assert (mine != other).mean() < 2e-3
    step = 2.0**-7 if dtype == "bfloat16" else 2.0**-10 if dtype == "float16" else 1e-5
    mine, other = (each.param.astype(np.float64) for each in (ours, theirs))
    np.testing.assert_allclose(mine, other, rtol=step, atol=1e-6)
    assert (mine == other).mean() > (0.99 if ours.param.itemsize == 2 else 0.3)


@ALL
def test_bits_do_not_depend_on_pieces_or_threads(dtype, form):
    whole, parts, threaded = (Shard(dtype, form, 2) for _ in range(3))
    whole.update(CpuKernel())
    parts.update(CpuKernel(), list(Span(0, NUMEL).chunks(CHUNK_NUMEL)))
    assert parts.bits() == whole.bits()
    kernel = CpuKernel(threads=3)
    threaded.update(kernel)
    kernel.close()
    assert threaded.bits() == whole.bits()


@ALL
def test_a_parameter_that_is_cut_has_the_bits_of_a_whole_one(dtype, form):
    whole, cut = (Shard(dtype, form) for _ in range(2))
    one = Chance(np.array([5], np.uint64), np.array([0]))
    two = Chance(np.array([5, 5], np.uint64), np.array([0, CHUNK_NUMEL]))
    whole.update(CpuKernel(), segments=[[0, NUMEL, 0]], chance=one)
    segments = [[0, CHUNK_NUMEL, 0], [CHUNK_NUMEL, NUMEL, 0]]
    cut.update(CpuKernel(), segments=segments, chance=two)
    assert cut.bits() == whole.bits()


@pytest.mark.parametrize("form", [StateForm(8), StateForm(32)], ids=["8", "32"])
def test_an_average_is_rounded_once_wherever_it_is_taken(form):
    one, other = (Shard("float32", form) for _ in range(2))
    third = np.float32(1 / 3)
    other.grads[0] *= third
    for shard, scale in (one, third), (other, 1.0):
        table = COEFFICIENTS.copy()
        table[:, StepCoefficients._fields.index("mean_scale")] = scale
        chance = CHANCE if form.rounds_by_chance else None
        shard.update(CpuKernel(), chance=chance, coefficients=table)
    assert one.bits() == other.bits()


@ALL
def test_what_is_in_no_segment_is_left_alone(dtype, form):
    before, after = (Shard(dtype, form) for _ in range(2))
    after.update(CpuKernel())
    np.testing.assert_array_equal(after.param[~INSIDE], before.param[~INSIDE])
    blocks = INSIDE.reshape(-1, 256).any(axis=1)
    for key, array in after.state.items():
        of = blocks if array.ndim == 2 else INSIDE
        np.testing.assert_array_equal(array[~of], before.state[key][~of])
        assert (array[of] != before.state[key][of]).any()


@pytest.mark.parametrize("bits", [8, 32])
def test_small_updates_of_bfloat16_add_up(bits):
    shard = Shard("bfloat16", StateForm(bits, has_masters=False), scale=0.0)
    shard.param[:] = 1
    for step in range(400):
        shard.grads[0][:] = 1
        count = StepCount(step + 1, 1e-9)
        table = np.array([NAdam(lr=1e-4).coefficients(count, 1.0)], np.float32)
        chance = Chance(np.array([step], np.uint64), np.array([0]))
        plan = UpdatePlan(WHOLE, np.array([[0, NUMEL, 0]]), table, chance=chance)
        kernel = CpuKernel()
        kernel.update(Rows.of(*shard.grads), Rows.of(shard.param), shard.state, plan)
    mean = shard.param.astype(np.float64).mean()
    # By 1e-4 a step, where bfloat16 goes by 4e-3. An exp_avg of 8 bits stops before it is 1.
    assert abs(mean - 0.96) < (0.001 if bits == 32 else 0.006)
    assert len(np.unique(shard.param)) > 2


def test_a_second_moment_moves_by_a_thousandth_of_itself():
    shard = Shard("float32", StateForm(8))
    shard.grads[0][:] = 2
    for key, value in ("exp_avg", 2.0), ("exp_avg_sq", 1.0):
        spec = next(spec for spec in shard.specs if spec.key == key)
        encode(np.full(NUMEL, value, np.float32), shard.state[key], spec.codec)
    for step in range(100):
        chance = Chance(np.array([step], np.uint64), np.array([0]))
        table = np.array([NAdam().coefficients(StepCount(step + 1, 0.5), 1.0)], "f4")
        plan = UpdatePlan(WHOLE, np.array([[0, NUMEL, 0]]), table, chance=chance)
        CpuKernel().update(Rows.of(*shard.grads), Rows.of(shard.param), shard.state, plan)
    expected = 4 - 3 * 0.999**100
    mean = shard.values("exp_avg_sq").mean()
    assert abs(mean - expected) < 4 * 0.15 * np.sqrt(100 * 0.01) / np.sqrt(NUMEL) + 0.002


@ALL
@pytest.mark.parametrize("odd", [np.inf, np.nan])
def test_what_is_not_finite_is_reported_and_keeps_its_block(dtype, form, odd):
    clean, shard = (Shard(dtype, form) for _ in range(2))
    place = 2 * CHUNK_NUMEL + 700
    shard.grads[0][place] = odd
    clean.update(CpuKernel())
    position = shard.update(CpuKernel())
    assert position <= place < position + CHUNK_NUMEL
    assert not np.isfinite(shard.param[place].astype(np.float32))
    block = place // 256 * 256
    others = np.r_[0:block, block + 256 : NUMEL]
    np.testing.assert_array_equal(shard.param[others], clean.param[others])
    for key in shard.state:
        np.testing.assert_array_equal(shard.values(key)[others], clean.values(key)[others])
