"""Comparing memory finds every differing byte, wherever spans begin and end."""

import numpy as np
import pytest

from shardopt.comm.node_memory.comparing import changed
from shardopt.comm.node_memory.fence import full_fence


@pytest.mark.parametrize("seed", range(20))
def test_changed_finds_each_differing_byte(seed):
    rng = np.random.default_rng(seed)
    numel = int(rng.integers(1, 20_000))
    a = rng.integers(0, 256, numel, np.uint8)
    b = a.copy()
    b[rng.integers(0, numel, rng.integers(0, 6))] ^= 1
    spans = np.sort(rng.integers(0, numel + 1, (200, 2)), axis=1)
    near = rng.integers(0, numel + 1, 200)
    spans = np.concatenate([spans, np.stack([near, np.minimum(near + seed, numel)], axis=1)])
    expected = [bool((a[start:stop] != b[start:stop]).any()) for start, stop in spans]
    assert changed(a, b, spans).tolist() == expected
    assert changed(a, b, spans[:0]).tolist() == []


def test_changed_takes_what_may_not_be_written():
    a, b = np.zeros(4096, np.uint8), np.zeros(4096, np.uint8)
    b[4095] = 1
    for array in (a, b):
        array.flags.writeable = False
    spans = np.array([[0, 4095], [4095, 4096]], np.int64)
    assert changed(a, b, spans).tolist() == [False, True]


def test_a_fence_can_be_called():
    full_fence()
