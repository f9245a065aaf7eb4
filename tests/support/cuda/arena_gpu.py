"""The calls of CUDA's runtime, with the memory of the node in the place of GPUs."""

import copy
import ctypes

import numpy as np

from shardopt.backends.cpu.kernel import CpuKernel
from shardopt.comm.node_memory.fence import full_fence
from shardopt.layout.padding import PAGE_NBYTES
from tests.support.arena_device import DeviceArray, memory_of

HEAP_NBYTES = 64 << 20
NUM_BLOCKS = 64
POISON = 0xFF


class GpuArray(DeviceArray):
    """An array whose device does all work at once, as torch's and NumPy's on the CPU do."""

    __module__ = "cupy"

    def copy(self):
        return GpuArray(self._memory.copy())


class GpuKernel:
    """The CPU's kernel on such arrays."""

    def __init__(self):
        self._kernel = CpuKernel()
        self.piece_numel, self.prepare = self._kernel.piece_numel, self._kernel.prepare
        self.take_poisoned, self.close = self._kernel.take_poisoned, self._kernel.close

    def update(self, sources, targets, state, plan):
        arrays = {key: memory_of(array) for key, array in state.items()}
        self._kernel.update(sources, targets, arrays, plan)
        full_fence()

    def reduce(self, sources, out, span, square_sums, factor=1.0):
        self._kernel.reduce(sources, memory_of(out), span, square_sums, factor)
        full_fence()


class Done:
    def is_done(self):
        return True

    def wait(self):
        pass


class GpuError(RuntimeError):
    """What the runtime answers."""


class ArenaGpu:
    """A GPU that is part of the node's memory; implements ``Gpu``.

    A rank may open a block of another, once, and the owner may free it only when nobody has it
    open. What breaks these rules is in ``violations``, as it may happen where nobody can raise.

    Collective: construction.

    Args:
        arena: The memory of the node.
        flaw: The name of a call that raises.

    Attributes:
        calls: The calls that order work, and those about registered memory.
        violations: See above.
    """

    def __init__(self, arena, flaw=None):
        self.number = self.rank = arena.comm.rank
        self.flaw = flaw
        size = arena.comm.size
        self._heaps = arena.allocate(size * HEAP_NBYTES).memory
        table = arena.allocate(size * NUM_BLOCKS * size).memory[: size * NUM_BLOCKS * size]
        self._openers = table.reshape(size, NUM_BLOCKS, size)  # of each owner's blocks
        self._top, self._num_blocks = 0, 0
        self.calls, self.violations, self.registered = [], [], {}
        self._opened = {}

    @property
    def num_open(self):
        """How many blocks of others this rank has open."""
        full_fence()
        return int(self._openers[:, :, self.rank].sum())

    def use(self, stream):
        self.calls.append(("use", stream))

    def is_capturing(self, stream):
        return stream < 0

    def record(self):
        self.calls.append(("record",))
        return Done()

    def side(self):
        side = copy.copy(self)
        side.calls = []
        return side

    def synchronize(self):
        self.calls.append(("synchronize",))

    def wait_for(self, event):
        self.calls.append(("wait_for", event if isinstance(event, int) else "recorded"))

    def allocate(self, nbytes):
        self._fail_if("allocate")
        memory = Block(self, self._num_blocks, self._top, nbytes)
        self._num_blocks, self._top = self._num_blocks + 1, self._top + nbytes
        return memory

    def array(self, address, nbytes, owner):
        return GpuArray(np.asarray(_Memory(address, nbytes, owner)))

    def dense(self, array):
        return GpuArray(np.ascontiguousarray(_memory_behind(array)))

    def duplicate(self, array):
        return array.copy()

    def copy(self, target, source, nbytes):
        ctypes.memmove(target, source, nbytes)
        full_fence()

    def zero(self, array):
        _memory_behind(array)[...] = 0

    def pinned(self, nbytes):
        return np.full(nbytes, POISON, np.uint8)

    def register(self, address, nbytes):
        self._fail_if("register")
        assert address % PAGE_NBYTES == 0
        assert all(address >= a + n or a >= address + nbytes for a, n in self.registered.items())
        self.registered[address] = nbytes

    def unregister(self, address):
        is_idle = self.calls[-1:] == [("synchronize",)]
        self._check(is_idle, "memory was unpinned while work might use it")
        del self.registered[address]

    def export(self, memory):
        self._fail_if("export")
        return memory.number.to_bytes(2, "little") + (self._start + memory.offset).to_bytes(
            8, "little"
        )

    def open(self, handle):
        self._fail_if("open")
        number, offset = int.from_bytes(handle[:2], "little"), int.from_bytes(handle[2:], "little")
        owner = offset // HEAP_NBYTES
        self._check(owner != self.rank, "a process cannot open its own handle")
        self._check(not self._openers[owner, number, self.rank], "opened twice")
        self._openers[owner, number, self.rank] = 1
        full_fence()
        address = self._heaps[offset:].ctypes.data
        self._opened[address] = owner, number
        return address

    def close(self, address):
        owner, number = self._opened.pop(address)
        self._openers[owner, number, self.rank] = 0
        full_fence()

    def mark(self):
        self._fail_if("mark")
        return -1, b"%d" % self.rank

    def record_mark(self, mark):
        assert mark == -1
        self.calls.append(("record_mark",))

    def open_mark(self, handle):
        self._fail_if("open_mark")
        self._check(int(handle) != self.rank, "a process cannot open its own handle")
        return int(handle)

    def make_kernel(self, node_size, *, is_staged):
        return GpuKernel()

    def free(self, block):
        """Called when nothing in this process uses a block any more."""
        full_fence()
        is_open = self._openers[self.rank, block.number].any()
        self._check(not is_open, f"block {block.number} was freed while others had it open")
        self._heaps[self._start + block.offset :][: block.nbytes] = POISON

    @property
    def _start(self):
        return self.rank * HEAP_NBYTES

    def _check(self, condition, violation):
        if not condition:
            self.violations.append(violation)

    def _fail_if(self, call):
        if self.flaw == call:
            raise GpuError(f"cudaErrorInvalidValue in {call}")


class Block:
    """Memory of a GPU of its own allocation."""

    def __init__(self, gpu, number, offset, nbytes):
        assert number < NUM_BLOCKS
        assert offset + nbytes <= HEAP_NBYTES
        self.gpu, self.number, self.offset, self.nbytes = gpu, number, offset, nbytes
        memory = gpu._heaps[gpu._start + offset :][:nbytes]
        memory[...] = 0
        self.ptr = memory.ctypes.data

    def __del__(self):
        self.gpu.free(self)


def _memory_behind(array):
    """Return the memory of an array that may be a framework's own, by its address."""
    if isinstance(array, np.ndarray | DeviceArray):
        return memory_of(array)
    memory = _Interface()
    memory.__array_interface__ = array.__cuda_array_interface__
    return np.asarray(memory).view(array.dtype)


class _Interface:
    pass


class _Memory:
    def __init__(self, address, nbytes, owner):
        self._owner = owner
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }
