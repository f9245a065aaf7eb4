"""Copies by way of two pinned buffers, on a device that works at once or not before it must."""

import numpy as np
import pytest

from shardopt.store import staging
from shardopt.store.staging import PinnedStaging
from tests.support.arena_device import inside, memory_of, on_device


class EarlyDevice:
    """Copies at once."""

    def __init__(self):
        self.pending, self.buffers = [], []

    def host_zeros(self, numel, dtype):
        self.buffers.append(np.zeros(numel, dtype))
        return self.buffers[-1]

    def copy(self, target, source):
        np.copyto(inside(target), inside(source), casting="no")

    def event(self):
        return LateEvent(self, [])

    def wait(self):
        self.do(list(self.pending))

    def do(self, copies):
        assert not copies


class LateDevice(EarlyDevice):
    """Copies at the last moment that its events allow."""

    def copy(self, target, source):
        self.pending.append((target, source))

    def event(self):
        return LateEvent(self, list(self.pending))

    def do(self, copies):
        for target, source in copies:
            if any(target is each[0] and source is each[1] for each in self.pending):
                self.pending.pop(0)
                super().copy(target, source)


class LateEvent:
    def __init__(self, device, copies):
        self.device, self.copies = device, copies

    def wait(self):
        self.device.do(self.copies)


@pytest.fixture(params=[EarlyDevice, LateDevice])
def device(monkeypatch, request):
    monkeypatch.setattr(staging, "_BUFFER_NBYTES", 64)
    return request.param()


def draw():
    """Arrays of all lengths around those of a buffer, and of several dtypes."""
    rng = np.random.default_rng(0)
    sizes = [(16, "f4"), (1, "f8"), (0, "f4"), (100, "f4"), (31, "f2"), (33, "f2"), (9, "f8")]
    return [rng.standard_normal(size).astype(dtype) for size, dtype in sizes]


def test_arrays_come_home(device):
    sources = draw()
    targets = [np.zeros_like(each) for each in sources]
    PinnedStaging(device).bring(
        (target, on_device(source)) for target, source in zip(targets, sources, strict=True)
    )
    for target, source in zip(targets, sources, strict=True):
        np.testing.assert_array_equal(target, source)
    assert [each.nbytes for each in device.buffers] == [64, 64]


def test_arrays_are_sent_out(device):
    sources = draw()
    targets = [on_device(np.zeros_like(each)) for each in sources]
    copies = PinnedStaging(device)
    copies.send(zip(targets, sources, strict=True))
    copies.send(zip(targets[:1], sources[:1], strict=True))
    for target, source in zip(targets, sources, strict=True):
        np.testing.assert_array_equal(memory_of(target), source)
    assert [each.nbytes for each in device.buffers] == [64, 64]
    assert not device.pending


def test_nothing_takes_no_buffers(device):
    PinnedStaging(device).bring([])
    PinnedStaging(device).send([(on_device(np.zeros(0)), np.zeros(0))])
    assert not device.buffers
