"""The tests that every backend must pass; a test file for a backend subclasses these."""

import numpy as np
import pytest

from shardopt.backends.base import ALL_FINITE, Backend, Rows, UpdatePlan
from shardopt.layout.dtypes import DTYPES
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.layout.state_spec import state_specs
from tests.support.kernel_arrays import assert_same_bits, coefficient_rows


class BackendSuite:
    """Subclasses give fixtures: ``backend``, and ``zeros``, which allocates [numel] of a dtype."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("numel", [0, 1, 5 * CHUNK_NUMEL])
    def test_host_zeros_can_be_read(self, backend: Backend, dtype, numel):
        array = backend.host_zeros(numel, dtype)
        assert type(array) is np.ndarray
        assert (array.shape, array.dtype) == ((numel,), np.dtype(dtype))
        assert not array.any()

    def test_arrays_are_filled_and_scaled(self, backend: Backend, zeros):
        array = zeros(CHUNK_NUMEL, "float32")
        backend.copy(array, np.full(CHUNK_NUMEL, 3, np.float32))
        backend.zero(array[5:7])
        backend.scale(array[:6], 0.5)
        expected = np.full(CHUNK_NUMEL, 3, np.float32)
        expected[5:7] = 0
        expected[:5] = 1.5
        assert_same_bits(backend.host(array), expected)

    def test_arrays_do_not_overlap(self, backend: Backend, zeros):
        arrays = [zeros(CHUNK_NUMEL, "float32") for _ in range(4)]
        for value, array in enumerate(arrays):
            backend.copy(array, np.full(CHUNK_NUMEL, value, np.float32))
        for value, array in enumerate(arrays):
            assert (backend.host(array) == value).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_copies_keep_every_bit(self, backend: Backend, zeros, dtype):
        numel = 999
        random = np.random.default_rng(0).bytes(numel * np.dtype(dtype).itemsize)
        values = np.frombuffer(random, dtype)
        origin, other, host = zeros(numel, dtype), zeros(numel, dtype), np.empty(numel, dtype)
        backend.copy(origin, values)
        backend.copy(other[10:], origin[:-10])
        backend.copy(host, other)
        backend.wait()
        expected = np.append(np.zeros(10, dtype), values[:-10])
        assert host.tobytes() == expected.tobytes()
        assert backend.host(other).tobytes() == expected.tobytes()

    def test_events_are_done_at_last(self, backend: Backend, zeros):
        array = zeros(CHUNK_NUMEL, "float32")
        backend.copy(array, np.ones(CHUNK_NUMEL, np.float32))
        event = backend.event()
        assert isinstance(event.is_done(), bool)
        assert (backend.host(array) == 1).all()  # waits for the copy
        assert event.is_done()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_kernel_updates_arrays_of_the_backend(self, backend: Backend, zeros, dtype):
        origin, grad = zeros(CHUNK_NUMEL, dtype), zeros(CHUNK_NUMEL, dtype)
        state = {each.key: zeros(CHUNK_NUMEL, each.dtype) for each in state_specs(dtype)}
        backend.copy(grad, np.ones(CHUNK_NUMEL, dtype))
        rows = coefficient_rows(dtype, (1, 0.5))
        plan = UpdatePlan(Span(0, CHUNK_NUMEL), np.array([[0, 100, 0]]), rows)
        backend.kernel.prepare(dtype)
        backend.kernel.update(Rows.of(grad), Rows.of(origin), state, plan)
        exp_avg = backend.host(state["exp_avg"])
        assert_same_bits(exp_avg[:100], np.full(100, rows[0, 4]))
        assert not exp_avg[100:].any()
        param = backend.host(origin)
        assert (param[:100] < 0).all()
        assert not param[100:].any()
        assert backend.kernel.take_poisoned() == ALL_FINITE
