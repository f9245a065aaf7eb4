"""The CUDA backend over node memory: who opens what, in which order it is released, and the steps.

What only a GPU can run, the calls of CuPy, is in ``cupy_gpu``; the rest is tested here.
"""

import gc

import numpy as np
import pytest
from mpi4py import MPI

import shardopt.core.parts
from shardopt import ShardPolicy
from shardopt.backends.cuda import backend as cuda
from shardopt.backends.cuda.backend import CudaBackend
from shardopt.backends.cuda.peers import Peers
from shardopt.backends.cuda.software import Software
from shardopt.comm.node_memory.arena import Arena
from shardopt.errors import CallOrderError, KernelError, SharedMemoryError
from shardopt.numpy import NAdam, Parameter
from tests.support.arena_device import memory_of
from tests.support.backend_suite import BackendSuite
from tests.support.cuda.arena_gpu import ArenaGpu, GpuArray
from tests.support.errors import is_last

DIRECT, STAGED = Peers(True), Peers(False, "rank 1 could not open memory of rank 0.")


def make_backend(comm, peers=DIRECT, flaw=None):
    arena = Arena(comm)
    backend = CudaBackend(ArenaGpu(arena, flaw), arena, peers)
    backend._gpu.calls.clear()
    return arena, backend


class TestCudaBackend(BackendSuite):
    @pytest.fixture
    def backend(self):
        self.arena, backend = make_backend(MPI.COMM_SELF)
        yield backend
        backend.close()

    @pytest.fixture
    def zeros(self, backend):
        def zeros(numel, dtype):
            block = backend.blocks(self.arena, numel * np.dtype(dtype).itemsize)[0]
            return block.view(np.dtype(dtype))

        return zeros


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
@pytest.mark.parametrize(("start", "stop"), [(0, 9000), (3, 8), (4096, 8192), (16, 9000)])
def test_scaling_has_the_bits_of_the_cpu(dtype, start, stop):
    arena, backend = make_backend(MPI.COMM_SELF)
    values = np.random.default_rng(0).standard_normal(9100).astype(dtype)
    block = backend.blocks(arena, values.nbytes)[0].view(values.dtype)
    backend.copy(block, values)
    backend.scale(block[start:stop], 0.3)
    values[start:stop] *= values.dtype.type(0.3)
    assert backend.host(block).tobytes() == values.tobytes()


def test_sources_may_have_strides_and_be_of_other_libraries():
    arena, backend = make_backend(MPI.COMM_SELF)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    block = backend.blocks(arena, 48)[0].view(np.float32).reshape(4, 3)
    for source in (values.T, GpuArray(values.T)):
        backend.zero(block)
        backend.copy(block, source)
        assert (memory_of(block) == values.T).all()


def test_a_range_of_node_memory_is_pinned_once_and_until_it_is_released():
    arena, backend = make_backend(MPI.COMM_SELF)
    memory = arena.allocate(20000).memory
    for part in (memory[5:9].view(np.float32), memory, memory[10000:]):
        backend.pin(part)
    backend.pin(memory[:0])
    assert list(backend._gpu.registered) == [memory.ctypes.data]
    part = memory[8:16].view(np.float32)
    del memory
    assert backend._gpu.registered
    del part
    gc.collect()
    assert not backend._gpu.registered
    assert not backend._gpu.violations


def test_memory_that_cannot_be_pinned_is_an_error():
    arena, backend = make_backend(MPI.COMM_SELF, flaw="register")
    with pytest.raises(SharedMemoryError, match=r"must be pinned .*ulimit -l"):
        backend.pin(arena.allocate(1).memory)


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_work_is_waited_for_before_its_memory_goes(leave):
    arena, backend = make_backend(MPI.COMM_SELF)
    calls = backend._gpu.calls
    if leave == "close":
        backend.close()
        assert calls == [("synchronize",)]
    del arena, backend
    gc.collect()
    assert calls[-1] == ("synchronize",)


def test_a_temporary_copy_is_read_before_it_goes():
    arena, backend = make_backend(MPI.COMM_SELF)
    calls, block = backend._gpu.calls, backend.blocks(arena, 16)[0]
    backend.copy(block, np.zeros(16, np.uint8))
    assert not calls
    backend.copy(block, np.zeros(32, np.uint8)[::2])
    assert calls == [("synchronize",)]


def test_work_in_another_stream_comes_behind_the_work_so_far():
    _, backend = make_backend(MPI.COMM_SELF)
    backend.enter(0)
    assert not backend._gpu.calls
    backend.enter(5)
    backend.enter(5)
    assert backend._gpu.calls == [("record",), ("use", 5), ("wait_for", "recorded")]
    with pytest.raises(CallOrderError, match="must be called outside of CUDA graphs"):
        backend.enter(-1)


def test_copies_beside_the_work_are_ordered_with_it_where_asked_for():
    arena, backend = make_backend(MPI.COMM_SELF)
    queue, block = backend.copy_queue(), backend.blocks(arena, 8)[0]
    queue.copy(block, np.arange(8, dtype=np.uint8))
    assert not queue._side.calls
    assert queue.event().is_done()
    assert backend.host(block).tolist() == list(range(8))
    backend._gpu.calls.clear()
    queue._side.calls.clear()
    queue.fork()
    assert (backend._gpu.calls, queue._side.calls) == ([("record",)], [("wait_for", "recorded")])
    queue.join()
    assert backend._gpu.calls[1:] == [("wait_for", "recorded")]
    assert queue._side.calls[1:] == [("record",)]


@pytest.mark.parametrize(
    ("software", "problem"),
    [
        (Software(None, None, None, 0, "CuPy is not installed. Install it: pip install X."), "X."),
        (Software("580", "13.6", None, 0, "CuPy is too old (13.6). Install version 14: Y."), "Y."),
    ],
)
def test_missing_software_is_named(monkeypatch, software, problem):
    monkeypatch.setattr(cuda, "examine_software", lambda: software)
    with pytest.raises(KernelError, match=r"on a GPU must .*" + problem):
        cuda.make_backend(0, Arena(MPI.COMM_SELF))


# -- several ranks ---------------------------------------------------------------------------------


@pytest.mark.mpi
def test_all_ranks_address_all_blocks(comm):
    arena, backend = make_backend(comm)
    blocks = backend.blocks(arena, 1000)
    assert [block.shape for block in blocks] == [(1000,)] * comm.size
    for block in blocks:
        assert not memory_of(block).any()
    comm.Barrier()
    for owner, block in enumerate(blocks):
        backend.copy(block[comm.rank : comm.rank + 1], np.array([comm.rank + owner], np.uint8))
    comm.Barrier()
    for owner, block in enumerate(blocks):
        assert backend.host(block)[: comm.size].tolist() == [owner + r for r in range(comm.size)]
    assert backend._gpu.num_open == comm.size - 1
    del blocks, block
    arena.reclaim()
    assert backend._gpu.num_open == 0
    arena.reclaim()
    assert not backend._gpu.violations


@pytest.mark.mpi
def test_blocks_are_freed_when_all_others_have_closed_them(comm):
    arena, backend = make_backend(comm)
    blocks = backend.blocks(arena, 1000)
    own, peer = blocks[comm.rank], blocks[comm.rank - 1]
    backend.copy(own, np.full(1000, 7, np.uint8))
    comm.Barrier()
    del blocks
    if not is_last(comm):
        del peer
        del own
    arena.reclaim()  # the last rank still reads from the one before it, which is done
    assert backend._gpu.num_open == (is_last(comm) and comm.size > 1)
    if is_last(comm):
        assert (backend.host(peer) == 7).all()
        del peer
    arena.reclaim()
    assert backend._gpu.num_open == 0
    if is_last(comm):
        assert (backend.host(own) == 7).all()  # it is its user's now
    assert not backend._gpu.violations


@pytest.mark.mpi
@pytest.mark.parametrize("flaw", ["allocate", "export", "open"])
def test_if_a_rank_fails_all_raise_and_nothing_stays_open(comm, flaw):
    if flaw == "open" and comm.size == 1:
        pytest.skip("a single rank opens nothing")
    arena, backend = make_backend(comm, flaw=flaw if is_last(comm) else None)
    if comm.size == 1 and flaw == "export":
        assert len(backend.blocks(arena, 10)) == 1
        return
    with pytest.raises(
        SharedMemoryError, match=f"every rank .* got cudaErrorInvalidValue in {flaw}"
    ):
        backend.blocks(arena, 1000)
    gc.collect()
    arena.reclaim()
    assert backend._gpu.num_open == 0
    arena.reclaim()
    assert not backend._gpu.violations


@pytest.mark.mpi
@pytest.mark.parametrize("flaw", ["mark", "open_mark"])
def test_events_that_a_rank_cannot_share_are_an_error_of_all(comm, flaw):
    if comm.size == 1:
        pytest.skip("a single rank waits for nobody")
    with pytest.raises(KernelError, match=f"cudaErrorInvalidValue in {flaw}"):
        make_backend(comm, flaw=flaw if is_last(comm) else None)


@pytest.mark.mpi
def test_events_order_the_devices_of_peers(comm):
    _, backend = make_backend(comm)
    backend.publish()
    backend.acquire()
    others = [("wait_for", rank) for rank in range(comm.size) if rank != comm.rank]
    assert backend._gpu.calls == ([("record_mark",), *others] if others else [])


@pytest.mark.mpi
def test_without_peers_the_host_waits_before_others_may_read(comm):
    arena, backend = make_backend(comm, STAGED)
    assert backend.why_staged == STAGED.reason
    sizes = [block.size for block in backend.blocks(arena, 10)]
    assert sizes == [10 if rank == comm.rank else 0 for rank in range(comm.size)]
    backend.publish()
    backend.acquire()
    assert backend._gpu.calls == [("synchronize",)]


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["direct", "staged", "offload"])
def test_steps_have_the_bits_of_the_cpu(comm, monkeypatch, way):
    gpus = []

    def make_device(name, arena):
        gpus.append(ArenaGpu(arena))
        return CudaBackend(gpus[-1], arena, STAGED if way == "staged" else DIRECT)

    monkeypatch.setattr(shardopt.core.parts, "make_device", make_device)
    policy = ShardPolicy(timeout_s=60, offload="cpu" if way == "offload" else None)
    rng = np.random.default_rng(comm.rank)
    start = [np.ones(9000, np.float32), np.ones((70, 70), np.float32)]
    params = [Parameter(GpuArray(value.copy())) for value in start]
    others = [Parameter(value.copy()) for value in start]
    opt = NAdam(params, comm=comm, policy=policy)
    reference = NAdam(others, comm=comm, policy=ShardPolicy(timeout_s=60))
    for _ in range(3):
        for param, other in zip(params, others, strict=True):
            grad = rng.standard_normal(other.data.shape).astype(np.float32)
            memory_of(param.grad)[...] = grad
            other.grad[...] = grad
        opt.step()
        reference.step()
        for param, other in zip(params, others, strict=True):
            assert memory_of(param.data).tobytes() == other.data.tobytes()
    reference.close()
    opt.close()
    del opt
    gc.collect()
    assert memory_of(params[0].data).tobytes() == others[0].data.tobytes()  # still there
    assert [gpu.num_open for gpu in gpus] == [0]
    assert not gpus[0].violations


@pytest.mark.mpi
def test_a_rank_without_cupy_makes_all_raise(comm, monkeypatch):
    problem = "CuPy is not installed. Install it: pip install it." if is_last(comm) else None
    monkeypatch.setattr(
        cuda, "examine_software", lambda: Software("580", "14.2", "13.0", 1, problem)
    )
    monkeypatch.setattr(cuda, "CudaBackend", lambda *args: pytest.fail("all should raise"))
    if not is_last(comm):
        monkeypatch.setattr(cuda, "_open_gpu", lambda number: object())
    with pytest.raises(KernelError, match="Install it: pip"):
        NAdam([Parameter(GpuArray(np.ones(3)))], comm=comm)
    NAdam([Parameter(np.ones(3))], comm=comm).close()  # the ranks are still in step


@pytest.mark.mpi
def test_a_step_that_a_rank_captures_is_refused_on_all(comm, monkeypatch):
    def make_device(name, arena):
        return CudaBackend(ArenaGpu(arena), arena, DIRECT)

    monkeypatch.setattr(shardopt.core.parts, "make_device", make_device)
    param = Parameter(GpuArray(np.ones(3)))
    opt = NAdam([param], comm=comm)
    with monkeypatch.context() as patch:
        if is_last(comm):
            patch.setattr(opt.core.parts.registry.adapter, "current_queue", lambda: -1)
        for call in (opt.step, opt.average_grads):
            with pytest.raises(CallOrderError, match="outside of CUDA graphs"):
                call()
    memory_of(param.grad)[...] = 1
    opt.step()
    opt.close()
