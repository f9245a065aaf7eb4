"""The loops that measure memory compute what they say, on all elements, and count their bytes."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from shardopt.layout.padding import PERIOD_NBYTES, STEP_NBYTES
from shardopt.measure import memory
from shardopt.measure.memory import ThreadedArrays, Triad, measure_addition


def whole(arrays):
    """Each array put together from its threads' parts."""
    return [np.concatenate(parts) for parts in zip(*arrays.map(lambda *p: p), strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_share_out_all_elements(dtype, num_threads):
    with ThreadedArrays(3, 1001, dtype, num_threads) as arrays:
        assert arrays.array_nbytes == 1001 * np.dtype(dtype).itemsize
        found = whole(arrays)
        assert [array.dtype.name for array in found] == [dtype] * 3
        for number, array in enumerate(found):
            assert array.tolist() == [1 + number] * 1001


def test_arrays_begin_where_the_optimizers_do():
    with ThreadedArrays(3, 100_000, "float32", 1) as arrays:
        ((first, *others),) = arrays.map(lambda *parts: [part.ctypes.data for part in parts])
    assert first % 4096 == 0
    offsets = [(address - first) % PERIOD_NBYTES for address in others]
    assert offsets == [STEP_NBYTES, 2 * STEP_NBYTES]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_what_the_loops_compute(num_threads):
    loops = Triad(1000, "float64", num_threads)
    assert loops.nbytes == 3 * 8 * 1000
    assert loops.copy_nbytes == 2 * 8 * 1000
    loops.triad()
    assert whole(loops._arrays)[0].tolist() == [2 + 3 * 3] * 1000
    loops.axpy()
    assert whole(loops._arrays)[0].tolist() == [11 + 3 * 3] * 1000
    loops.copy()
    assert whole(loops._arrays)[0].tolist() == [2] * 1000
    loops.close()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_addition_adds_block_by_block(monkeypatch, num_threads):
    monkeypatch.setattr(memory, "_BLOCK_NUMEL", 100)
    with ThreadedArrays(2, 750, "float32", num_threads) as arrays:
        assert measure_addition(arrays, 0.01) > 0
        a, b = whole(arrays)
    assert set(b) == {2}
    starts = [750 * thread // num_threads for thread in range(num_threads)]
    assert min(a[starts]) > 1  # every thread has added at least its first block
    assert set(a % 2) == {1}


def test_the_bytes_of_an_addition_are_counted(monkeypatch):
    clock = iter([0.0, 1.0, 2.0])  # the start, and the end of each block
    monkeypatch.setattr(memory, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(memory, "_BLOCK_NUMEL", 100)
    with ThreadedArrays(2, 150, "float64", 1) as arrays:
        assert measure_addition(arrays, 2.0) == 3 * 8 * (100 + 50) / 2.0


def test_an_addition_needs_no_numba():
    code = (
        "import sys; from shardopt.measure.memory import ThreadedArrays, measure_addition;"
        "measure_addition(ThreadedArrays(2, 100, 'float32', 1), 0.001);"
        "print('numba' in sys.modules, 'mpi4py' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False False\n"
