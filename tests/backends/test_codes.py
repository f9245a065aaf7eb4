"""Codes of 8 bits: their values, how far off they are, and that they are right on average."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardopt.backends.codes import SHIFT, Blocks, decode, encode
from shardopt.layout.state_spec import BLOCK_NBYTES, BLOCK_NUMEL
from shardopt.rule.rounding import random_numbers

CODECS = pytest.mark.parametrize("codec", ["signed", "unsigned"])
OCTAVES = {"signed": 126 / 8, "unsigned": 254 / 8}
"""From the largest level of a block down to the smallest."""


def blocks_for(numel):
    return np.zeros((-(-numel // BLOCK_NUMEL), BLOCK_NBYTES), np.uint8)


def encoded(values, codec, *noise) -> Blocks:
    blocks = blocks_for(values.size)
    encode(values, blocks, codec, *noise)
    return blocks


def block_of_all_codes(codec, scale):
    """A block with each code once; the largest one stands for its scale."""
    block = blocks_for(BLOCK_NUMEL)
    level = np.float32(scale).view(np.uint32) >> SHIFT << SHIFT
    block[:, :4] = np.array([level], np.uint32).view(np.uint8)
    block[:, 4:] = np.arange(BLOCK_NUMEL)
    return block


@CODECS
@pytest.mark.parametrize("scale", [1.0, 0.9375, 1.875, 2.0**100, 2.0**-60])
@pytest.mark.parametrize("noise", [0, 1 << SHIFT - 1, (1 << SHIFT) - 1])
def test_all_codes_stay_as_they_are_however_they_are_rounded(codec, scale, noise):
    block = block_of_all_codes(codec, scale)
    if codec == "unsigned":  # a zero is in no block that is not zero
        block[:, 4] = 1
    again = encoded(decode(block, codec, BLOCK_NUMEL), codec, noise)
    np.testing.assert_array_equal(again, block)


@CODECS
def test_larger_codes_are_larger_values(codec):
    values = decode(block_of_all_codes(codec, 1.0), codec, BLOCK_NUMEL)
    positive = values[:128] if codec == "signed" else values
    assert (np.diff(positive) > 0).all()
    assert positive[0] == 0
    assert positive[-1] == 1
    np.testing.assert_allclose(positive[1], 2 ** -OCTAVES[codec], rtol=0.1)
    if codec == "signed":
        np.testing.assert_array_equal(values[128:], -values[:128])


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@CODECS
@given(st.lists(floats, max_size=600), st.integers(0, (1 << SHIFT) - 1))
def test_decoding_and_encoding_again_changes_nothing(codec, values, noise):
    values = np.array(values, np.float32)
    values = np.abs(values) if codec == "unsigned" else values
    blocks = encoded(values, codec, noise)
    shown = decode(blocks, codec, values.size)
    np.testing.assert_array_equal(encoded(shown, codec), blocks)
    assert (np.sign(shown) * np.sign(values) >= 0).all()


@CODECS
@given(st.integers(1, 700), st.floats(1e-20, 1e20), st.integers(0, 99))
def test_codes_are_within_a_sixteenth(codec, numel, scale, seed):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(numel) * scale).astype(np.float32)
    values = np.abs(values) if codec == "unsigned" else values
    error = np.abs(decode(encoded(values, codec), codec, numel) - values)
    for start in range(0, numel, BLOCK_NUMEL):
        part = slice(start, start + BLOCK_NUMEL)
        smallest = np.abs(values[part]).max() * 2 ** -OCTAVES[codec] * 1.2
        assert (error[part] <= np.maximum(np.abs(values[part]) / 16, smallest)).all()


def test_an_exp_avg_sq_is_zero_only_where_all_are():
    values = np.zeros(3 * BLOCK_NUMEL, np.float32)
    values[5], values[300] = 1, 1e-38
    shown = decode(encoded(values, "unsigned"), "unsigned", values.size)
    assert (shown[: 2 * BLOCK_NUMEL] > 0).all()
    assert not shown[2 * BLOCK_NUMEL :].any()
    np.testing.assert_array_equal(encoded(values, "unsigned")[2], 0)


@CODECS
@pytest.mark.parametrize("odd", [np.inf, np.nan, np.float32(3.4e38)])
def test_what_is_not_finite_stays_so_and_keeps_its_block(codec, odd):
    values = np.ones(2 * BLOCK_NUMEL, np.float32)
    values[7] = odd
    shown = decode(encoded(values, codec), codec, values.size)
    assert np.isinf(shown[7])
    assert (shown[BLOCK_NUMEL:] == 1).all()


@CODECS
def test_codes_behind_the_last_element_are_zero(codec):
    blocks = encoded(np.full(BLOCK_NUMEL + 3, 2.0, np.float32), codec)
    assert blocks[1, 4:7].all()
    assert not blocks[1, 7:].any()


def test_rounding_by_chance_is_right_on_average():
    numel, steps = 1 << 12, 64
    rng = np.random.default_rng(0)
    values = rng.uniform(0.01, 1, numel).astype(np.float32)
    values[::BLOCK_NUMEL] = 1
    total = np.zeros(numel)
    for step in range(steps):
        noise = random_numbers(step * 977, 0, numel) & np.uint32((1 << SHIFT) - 1)
        total += decode(encoded(values, "unsigned", noise), "unsigned", numel)
    distance = 2.0 ** (np.floor(np.log2(values)) - 3)  # of two levels
    deviation = (total / steps - values) / distance * np.sqrt(steps)
    assert abs(deviation.mean()) < 4 * 0.5 / np.sqrt(numel)
    assert np.abs(deviation).max() < 4 * np.sqrt(steps) * 0.5


@pytest.mark.parametrize(("scatter", "low", "high"), [(0.0, -0.4, -0.2), (1.0, -0.02, 0.02)])
def test_an_average_to_the_nearest_follows_gradients_that_scatter(scatter, low, high):
    rng, numel = np.random.default_rng(0), 2048
    mean = (2.0 ** rng.uniform(-4, 0, numel)).astype(np.float32)
    exp_avg, total = np.zeros(numel, np.float32), np.zeros(numel)
    for step in range(200):
        grad = (mean * (1 + scatter * rng.standard_normal(numel))).astype(np.float32)
        values = np.float32(0.9) * exp_avg + np.float32(0.1) * grad
        exp_avg = decode(encoded(values, "signed"), "signed", numel)
        total += exp_avg if step >= 50 else 0
    assert low < np.mean(total / 150 / mean) - 1 < high
