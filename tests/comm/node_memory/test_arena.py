"""The arena: ranges of one unnamed file that the ranks of a node map."""

import gc
import os
import weakref

import numpy as np
import pytest
from mpi4py import MPI

from shardopt.comm.node_memory.arena import Arena, can_share
from shardopt.comm.node_memory.fence import full_fence
from shardopt.comm.node_memory.linux import PAGE_NBYTES
from shardopt.layout.padding import PERIOD_NBYTES

MIB = 1 << 20


def meet(comm):
    full_fence()
    comm.Barrier()
    full_fence()


def file_nbytes(arena):
    """The memory that the file takes: holes take none."""
    return os.fstat(arena.fd).st_blocks * 512


def num_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.mpi
def test_all_ranks_see_one_memory(comm):
    memory = Arena(comm).allocate(PAGE_NBYTES * comm.size).memory
    assert not memory.any()
    meet(comm)
    memory[comm.rank * PAGE_NBYTES : (comm.rank + 1) * PAGE_NBYTES] = comm.rank + 1
    meet(comm)
    expected = np.repeat(np.arange(1, comm.size + 1), PAGE_NBYTES)
    np.testing.assert_array_equal(memory, expected)


@pytest.mark.mpi
def test_a_view_is_the_ranks_own_to_write_to(comm):
    shared = Arena(comm).allocate(3 * PAGE_NBYTES, private=True)
    if comm.rank == 0:
        shared.memory[:] = 7
    meet(comm)
    assert (shared.view == 7).all()
    shared.view[PAGE_NBYTES] = comm.rank
    meet(comm)
    assert shared.view[PAGE_NBYTES] == comm.rank
    assert (shared.memory == 7).all()
    meet(comm)
    if comm.rank == 0:
        shared.memory[:] = 8
    meet(comm)
    assert (shared.view[:PAGE_NBYTES] == 8).all()
    assert (shared.view[2 * PAGE_NBYTES :] == 8).all()
    assert shared.view[PAGE_NBYTES + 1] == 7  # the page is the rank's own


@pytest.mark.mpi
def test_without_a_view_there_is_one_array(comm):
    shared = Arena(comm).allocate(1)
    assert shared.view is shared.memory


@pytest.mark.mpi
@pytest.mark.parametrize("private", [False, True])
def test_ranges_do_not_overlap_and_large_ones_begin_on_a_period(comm, private):
    arena = Arena(comm)
    sizes = [1, 4096, 5000, PERIOD_NBYTES, 3 * MIB + 1, 17, 9 * MIB, PERIOD_NBYTES + 1, 3]
    ranges = [arena.allocate(size, private=private) for size in sizes]
    for number, (size, shared) in enumerate(zip(sizes, ranges, strict=True)):
        assert shared.memory.size >= size
        assert shared.memory.ctypes.data % PAGE_NBYTES == 0
        if size >= PERIOD_NBYTES:
            assert shared.memory.ctypes.data % PERIOD_NBYTES == 0
        if comm.rank == number % comm.size:
            assert not shared.memory.any()
            shared.memory[:] = number + 1
    meet(comm)
    for number, shared in enumerate(ranges):
        assert (shared.memory == number + 1).all()
        assert (shared.view == number + 1).all()


@pytest.mark.mpi
def test_chunks_at_least_double_so_that_there_are_few(comm):
    gc.collect()  # arenas of other tests
    arena = Arena(comm)
    before = num_descriptors()
    ranges = [arena.allocate(100 * 1024, private=True) for _ in range(1000)]
    assert len(arena.chunks) <= 9  # 100 MB from 1 MiB on
    assert num_descriptors() == before
    assert file_nbytes(arena) == 0  # memory is taken when it is touched
    del ranges


@pytest.mark.mpi
def test_a_range_is_reused_once_no_rank_holds_it(comm):
    arena = Arena(comm)
    first = arena.allocate(8 * MIB, private=True)
    address = first.memory.ctypes.data
    if comm.rank == 0:
        first.memory[:] = 9
    meet(comm)
    first.view[5] = 1
    held = first.memory[3:5] if comm.rank == comm.size - 1 else None
    del first
    other = arena.allocate(8 * MIB, private=True)  # a chunk of its own, as one rank holds the first
    assert other.memory.ctypes.data != address
    assert held is None or (held == 9).all()
    del held, other
    again = arena.allocate(8 * MIB, private=True)
    assert again.memory.ctypes.data == address
    assert not again.memory.any()
    assert not again.view.any()  # what this rank had written there is gone
    meet(comm)


@pytest.mark.mpi
def test_memory_of_dropped_ranges_is_given_back(comm):
    arena = Arena(comm)
    shared = arena.allocate(8 * MIB)
    kept = arena.allocate(MIB)
    for memory in (shared.memory, kept.memory):
        memory[:] = 1
    meet(comm)
    assert file_nbytes(arena) == 9 * MIB
    meet(comm)
    del shared, memory
    arena.reclaim()
    assert file_nbytes(arena) == MIB
    assert (kept.memory == 1).all()


@pytest.mark.mpi
def test_what_is_zero_can_be_given_back(comm):
    arena = Arena(comm)
    memory = arena.allocate(10 * PAGE_NBYTES, private=True).memory
    if comm.rank == 0:
        memory[:] = 0
        memory[:7] = memory[-7:] = 1
        arena.trim(memory)  # not zero
        assert file_nbytes(arena) == 10 * PAGE_NBYTES
        arena.trim(memory[7:-7])
        assert file_nbytes(arena) == 2 * PAGE_NBYTES  # those that others have a part of
        arena.trim(memory[7:-7])
        arena.trim(memory[:5])
        arena.trim(np.zeros(PAGE_NBYTES))  # elsewhere
    meet(comm)
    assert file_nbytes(arena) == 2 * PAGE_NBYTES
    meet(comm)  # whoever reads a hole fills it
    assert memory[:7].all()
    assert memory[-7:].all()
    assert not memory[7:-7].any()
    meet(comm)


@pytest.mark.mpi
def test_arrays_keep_the_arena_alive(comm):
    arena = Arena(comm)
    alive = weakref.ref(arena)
    shared = arena.allocate(MIB, private=True)
    shared.view[:] = 3
    view = shared.view[10:]
    del arena, shared
    gc.collect()
    assert (view == 3).all()
    assert alive() is not None
    before = num_descriptors()
    del view
    gc.collect()
    assert alive() is None
    assert num_descriptors() == before - 1


@pytest.mark.mpi
def test_nothing_is_taken_from_dev_shm(comm):
    status = os.statvfs("/dev/shm")
    before = comm.allgather(status.f_bfree)
    shared = Arena(comm).allocate(32 * MIB)
    shared.memory[:] = 1
    meet(comm)
    taken = (before[0] - os.statvfs("/dev/shm").f_bfree) * status.f_frsize
    assert comm.allreduce(taken, MPI.MAX) < 16 * MIB  # other tests may run beside this one


@pytest.mark.mpi
def test_ranks_of_one_machine_can_share(comm):
    before = num_descriptors()
    assert can_share(comm)
    assert num_descriptors() == before


FORK = """
import os
from mpi4py import MPI
from shardopt.comm.node_memory.arena import Arena
from shardopt.comm.node_memory.fence import full_fence
from shardopt.comm.node_memory.linux import PAGE_NBYTES

comm = MPI.COMM_WORLD

def meet():
    full_fence()
    comm.Barrier()
    full_fence()

shared = Arena(comm).allocate(2 * PAGE_NBYTES, private=True)
meet()
to_child, of_parent = os.pipe()
to_parent, of_child = os.pipe()
child = os.fork()
if child == 0:
    try:
        shared.memory[0] = shared.view[1] = 99
        os.write(of_child, b"w")
        os.read(to_child, 1)
        seen = shared.memory[PAGE_NBYTES], shared.view[PAGE_NBYTES]
        os.write(of_child, bytes([*seen, shared.memory[0]]))
    finally:
        os._exit(0)  # without mpi4py's farewell, which is the parent's
assert os.read(to_parent, 1) == b"w"
assert not shared.memory.any()
assert not shared.view.any()
meet()
if comm.rank == 0:
    shared.memory[PAGE_NBYTES] = 5
meet()
os.write(of_parent, b"g")
assert list(os.read(to_parent, 3)) == [5, 5, 99]
os.waitpid(child, 0)
assert comm.allreduce(int(shared.memory[0])) == 0
print("alone")
"""


def test_a_forked_child_sees_what_ranks_write_but_writes_for_itself(mpirun):
    job = mpirun(2, source=FORK)
    assert job.returncode == 0, job.output
    assert job.stdout.count("alone") == 2
