"""The tests that every backend must pass; a test file for a backend subclasses these."""

import numpy as np
import pytest

from shardopt.backends.base import ALL_FINITE, Backend, Rows, UpdatePlan
from shardopt.comm.node_memory.arena import Arena
from shardopt.comm.node_memory.fence import full_fence
from shardopt.layout.dtypes import DTYPES, compute_dtype
from shardopt.layout.padding import PERIOD_NBYTES, STEP_NBYTES
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.layout.state_spec import state_specs
from tests.support.kernel_arrays import assert_same_bits, coefficient_rows


def address(array):
    return int(Rows.of(array).addresses[0])


class BackendSuite:
    """Subclasses give a fixture ``backend``."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("numel", [0, 1, 5 * CHUNK_NUMEL])
    def test_zeros_are_zero_and_padded(self, backend: Backend, dtype, numel):
        origin = backend.zeros(3, "float32", 0, np.zeros(1))
        for index in (0, 1, 7):
            array = backend.zeros(numel, dtype, index, origin)
            assert (array.shape, array.dtype) == ((numel,), np.dtype(dtype))
            assert not backend.host(array).any()
            if numel:  # see [Note: padding between arrays]
                distance = address(array) - address(origin)
                assert (distance - index * STEP_NBYTES) % PERIOD_NBYTES == 0

    def test_arrays_do_not_overlap(self, backend: Backend):
        origin = backend.zeros(CHUNK_NUMEL, "float32", 0, np.zeros(1))
        arrays = [origin, *(backend.zeros(CHUNK_NUMEL, "float32", 1, origin) for _ in range(3))]
        for value, array in enumerate(arrays):
            backend.copy(array, np.full(CHUNK_NUMEL, value, np.float32))
        for value, array in enumerate(arrays):
            assert (backend.host(array) == value).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_copies_keep_every_bit(self, backend: Backend, dtype):
        numel = 999
        random = np.random.default_rng(0).bytes(numel * np.dtype(dtype).itemsize)
        values = np.frombuffer(random, dtype)
        origin = backend.zeros(numel, dtype, 0, np.zeros(1))
        other, host = backend.zeros(numel, dtype, 1, origin), np.empty(numel, dtype)
        backend.copy(origin, values)
        backend.copy(other[10:], origin[:-10])
        backend.copy(host, other)
        expected = np.append(np.zeros(10, dtype), values[:-10])
        assert host.tobytes() == expected.tobytes()
        assert backend.host(other).tobytes() == expected.tobytes()

    def test_events_are_done_at_last(self, backend: Backend):
        array = backend.zeros(CHUNK_NUMEL, "float32", 0, np.zeros(1))
        backend.copy(array, np.ones(CHUNK_NUMEL, np.float32))
        event = backend.event()
        assert isinstance(event.is_done(), bool)
        assert (backend.host(array) == 1).all()  # waits for the copy
        assert event.is_done()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_kernel_updates_arrays_of_the_backend(self, backend: Backend, dtype):
        full, origin = compute_dtype(dtype), backend.zeros(CHUNK_NUMEL, dtype, 0, np.zeros(1))
        grad, state = backend.zeros(CHUNK_NUMEL, dtype, 1, origin), {}
        for index, key in enumerate([each.key for each in state_specs(dtype)]):
            state[key] = backend.zeros(CHUNK_NUMEL, full, 2 + index, origin)
        backend.copy(grad, np.ones(CHUNK_NUMEL, dtype))
        rows = coefficient_rows(dtype, (1, 0.5))
        plan = UpdatePlan(Span(0, CHUNK_NUMEL), np.array([[0, 100, 0]]), rows)
        backend.kernel.prepare(dtype)
        assert backend.kernel.update(Rows.of(grad), Rows.of(origin), state, plan) == ALL_FINITE
        exp_avg = backend.host(state["exp_avg"])
        assert_same_bits(exp_avg[:100], np.full(100, rows[0, 4]))
        assert not exp_avg[100:].any()
        param = backend.host(origin)
        assert (param[:100] < 0).all()
        assert not param[100:].any()


@pytest.mark.mpi
class SharedMemorySuite:
    """``Backend.share``, on the ranks of one machine."""

    def test_ranks_share_memory(self, backend: Backend, comm):
        sizes = [4096 * (rank + 1) for rank in range(comm.size)]
        shared = backend.share(Arena(comm), sum(sizes), private=False)
        assert shared.memory.nbytes == sum(sizes)
        start = sum(sizes[: comm.rank])
        own = shared.memory[start : start + sizes[comm.rank]]
        backend.copy(own, np.full(sizes[comm.rank], comm.rank + 1, np.uint8))
        full_fence()
        comm.Barrier()
        full_fence()
        expected = np.repeat(np.arange(1, comm.size + 1), sizes)
        np.testing.assert_array_equal(backend.host(shared.memory), expected)
        comm.Barrier()
