"""``CudaKernel``: what it launches, packs and reports."""

import numpy as np
import pytest

from shardopt.backends.base import ALL_FINITE, Rows, UpdatePlan
from shardopt.backends.cuda import kernel as cuda
from shardopt.errors import KernelError
from shardopt.layout.dtypes import DTYPES
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from tests.support.cuda import nvrtc
from tests.support.cuda.cases import (
    CPU,
    assert_flat_index_is_told,
    assert_overflow_is_told,
    assert_same_update,
    hard_arena,
    hard_segments,
)
from tests.support.cuda.devices import DeviceKernel, PtxDevice
from tests.support.kernel_arrays import (
    SIXTEEN_BITS,
    Arena,
    assert_equal_arenas,
    assert_same_bits,
    coefficient_rows,
)

ACCESS = {("ld", 16), ("st", 16)}


@pytest.fixture
def device():
    nvrtc.require()
    return PtxDevice()


@pytest.fixture
def kernel(device):
    return DeviceKernel(device)


@pytest.mark.parametrize("num_cohorts", [16, 17, 40])
def test_more_cohorts_than_fit_take_several_launches(kernel, num_cohorts):
    ours, theirs = hard_arena(2, "float32"), hard_arena(2, "float32")
    rows = coefficient_rows("float32", *((step, 0.5) for step in range(1, num_cohorts + 1)))
    segments = [[100 * k, 100 * k + 93, k % num_cohorts] for k in range(ours.numel // 100)]
    found, expected = ours.update(kernel, segments, rows), theirs.update(CPU, segments, rows)
    assert_equal_arenas(ours, theirs)
    assert found == expected == ALL_FINITE
    assert len(kernel.device.launches) == -(-num_cohorts // 16)


def test_only_chunks_with_segments_are_launched(kernel):
    arena, rows = Arena(1, "float32"), coefficient_rows("float32", *((3, 0.3),) * 20)
    first, second = 5, CHUNK_NUMEL + 9
    arena.update(kernel, [[first, first + 1, 0], [second, second + 1, 17]], rows)
    assert kernel.device.launches == [("update", 1), ("update", 1)]
    arena.update(kernel, [[first, first + 1, 17], [second, second + 1, 17]], rows)
    assert kernel.device.launches[2:] == [("update", 2)]
    arena.update(kernel, [[first, first + 1, 0]], rows, Span(CHUNK_NUMEL, 2 * CHUNK_NUMEL))
    arena.update(kernel, [[first, first, 0]], rows)
    kernel.reduce(arena.grads, None, Span(CHUNK_NUMEL, CHUNK_NUMEL))
    assert len(kernel.device.launches) == 3


def test_tables_are_uploaded_once_and_dropped_with_time(kernel, monkeypatch):
    monkeypatch.setattr(cuda, "_MAX_TABLES", 2)
    arena, rows = Arena(1, "float32"), coefficient_rows("float32", (3, 0.3), (4, 0.2))
    uploads = []
    upload = kernel.device.upload
    monkeypatch.setattr(
        kernel.device, "upload", lambda table: uploads.append(table) or upload(table)
    )
    for number, expected in [(0, 2), (0, 2), (1, 4), (0, 4), (2, 6), (1, 6), (0, 8)]:
        arena.update(kernel, [[0, 50 + number, 0]], rows)
        assert len(uploads) == expected


def test_the_whole_vectors_of_arrays_are_accessed(device):
    """What is read again where a segment ends is read in 16 bytes, too."""
    kernel, array = cuda.CudaKernel(device), device.memory.array
    arena = hard_arena(2, "bfloat16", num_targets=2)
    sources, targets = [array(grad) for grad in arena.grads], [array(p) for p in arena.params]
    state = {key: array(values) for key, values in arena.state.items()}
    rows = np.array(hard_segments(arena.numel, 1))
    plan = UpdatePlan(arena.whole, rows, coefficient_rows("bfloat16", (3, 0.3)))
    kernel.update(Rows.of(*sources), Rows.of(*targets), state, plan)
    for source in sources:
        assert device.memory.accesses_of(source) == {("ld", 16)}
    for written in (*targets, *state.values()):
        assert device.memory.accesses_of(written) == ACCESS


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_is_told_once_and_by_its_flat_index(kernel, dtype):
    assert_flat_index_is_told(kernel, dtype)


def test_the_lowest_of_several_updates_is_told(device):
    kernel, array = cuda.CudaKernel(device), device.memory.array
    numel = CHUNK_NUMEL
    state = {key: array(np.zeros(numel)) for key in ("exp_avg", "exp_avg_sq")}
    rows = Rows.of(array(np.full(numel, np.nan))), Rows.of(array(np.zeros(numel)))
    for origin in (3, 1, 2):
        coefficients = coefficient_rows("float64", (3, 0.3))
        plan = UpdatePlan(
            Span(0, numel), np.array([[0, numel, 0]]), coefficients, origin * CHUNK_NUMEL
        )
        kernel.update(*rows, state, plan)
    assert kernel.take_poisoned() == CHUNK_NUMEL


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_a_parameter_too_large_for_its_dtype_is_told(kernel, dtype):
    assert_overflow_is_told(kernel, dtype)


def test_a_sum_may_replace_a_source(device):
    kernel, array = cuda.CudaKernel(device), device.memory.array
    grads = hard_arena(3, "float32").grads
    expected, expected_squares = np.zeros_like(grads[0]), np.zeros(2)
    CPU.reduce(grads, expected, Span(0, grads[0].size), expected_squares)
    inner, square_sums = [array(grad) for grad in grads], array(np.zeros(2))
    second = Span(CHUNK_NUMEL, 2 * CHUNK_NUMEL)
    kernel.reduce(Rows.of(*inner), inner[1][second.slice], second, square_sums[1:])
    assert_same_bits(inner[1][second.slice], expected[second.slice])
    assert_same_bits(inner[1][:CHUNK_NUMEL], grads[1][:CHUNK_NUMEL])
    assert square_sums.tolist() == [0.0, expected_squares[1]]
    kernel.reduce(Rows.of(*inner[:1]), inner[2], Span(0, 2 * CHUNK_NUMEL), None)
    assert_same_bits(inner[2], grads[0])


def test_arrays_may_be_those_of_a_device(kernel):
    """They have an address, but no elements that the host could read."""

    class DeviceArray:
        def __init__(self, inner):
            self.__cuda_array_interface__ = {"data": (inner.ctypes.data, False)}
            self.dtype, self.shape, self.size, self.flags = (
                inner.dtype,
                inner.shape,
                inner.size,
                inner.flags,
            )

    def as_device_array(table):
        return DeviceArray(kernel.device.memory.array(table))

    array = kernel.device.memory.array
    kernel.device.upload = as_device_array
    kernel.device.memory.array = lambda values: array(values)
    assert_same_update(kernel, lambda: hard_arena(1, "float32"))
    out, square_sums = array(np.zeros(CHUNK_NUMEL)), array(np.zeros(1))
    source = DeviceArray(array(np.full(CHUNK_NUMEL, 3.0)))
    kernel.kernel.reduce(
        Rows.of(source), DeviceArray(out), Span(0, CHUNK_NUMEL), DeviceArray(square_sums)
    )
    assert (out == 3.0).all()
    assert square_sums[0] == 9.0 * CHUNK_NUMEL


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_nodes", "is_staged", "num_targets"),
    [(1, False, 3), (1, True, 2), (2, False, 4), (2, True, 2)],
)
def test_what_is_prepared_need_not_be_compiled_later(
    device, monkeypatch, dtype, num_nodes, is_staged, num_targets
):
    loaded = []
    monkeypatch.setattr(device, "load", lambda name, text, options: loaded.append(options) or run)

    def run(blocks, threads, argument):
        assert threads == 256

    kernel = cuda.CudaKernel(device, 3, is_staged=is_staged)
    arena = Arena(3, dtype, num_targets=num_targets)
    full = arena.state["exp_avg"].dtype
    sources, targets, squares = Rows.of(*arena.grads), Rows.of(*arena.params), np.zeros(2)
    sums = np.zeros(arena.numel, full)
    plan = UpdatePlan(arena.whole, np.array([[0, 9, 0]]), coefficient_rows(dtype, (3, 0.3)))
    kernel.prepare(dtype, None if num_nodes == 1 else "bfloat16", num_nodes)
    num_prepared = len(loaded)
    assert num_prepared
    kernel.reduce(sources[:1], None, arena.whole, squares)
    if num_nodes == 1:
        kernel.update(sources, targets, arena.state, plan)
        kernel.reduce(sources, sums, arena.whole, squares)
    else:
        wire = [np.zeros(arena.numel, "bfloat16") for _ in range(num_nodes)]
        kernel.reduce(sources, wire[0], arena.whole, None)
        kernel.reduce(Rows.of(*wire), sums, arena.whole, squares)
    kernel.update(Rows.of(sums), targets, arena.state, plan)
    assert len(loaded) == num_prepared == len(set(loaded))


@pytest.mark.parametrize("dtype", ["int16", "complex64"])
def test_other_dtypes_are_refused(device, dtype):
    with pytest.raises(KernelError, match=f"float16, bfloat16, float32, float64; got {dtype}"):
        cuda.CudaKernel(device).prepare(dtype)


def test_more_addresses_than_a_launch_takes_are_refused(device):
    rows = Rows(np.dtype("float32"), CHUNK_NUMEL, np.zeros(600, np.int64))
    with pytest.raises(KernelError, match=r"fit into 4,096 bytes of arguments; got 4,\d+ bytes"):
        cuda.CudaKernel(device).reduce(rows, None, Span(0, CHUNK_NUMEL), None)


def test_a_closed_kernel_keeps_nothing(kernel):
    arena = Arena(1, "float32")
    arena.update_all(kernel, coefficient_rows("float32", (3, 0.3)))
    kernel.kernel.close()
    assert not kernel.kernel._launches
    assert not kernel.kernel._tables
