"""A device whose memory is node memory: the host's side of devices, tested without one.

Its arrays have an address and can be sliced, as CuPy's can, but no elements that the host could
read or write by mistake: only the device can.

Work is put into a queue and carried out as late as may be: when the host waits for it, or when this
rank publishes it, as nobody carries it out while this rank's host waits in MPI. A wait that is
missing therefore shows as old values, in every run; and whatever the ranks order by events and
fences is checked by ``tests.support.order``.
"""

import contextlib
import functools
import weakref
from contextlib import contextmanager

import numpy as np

import shardopt.core.parts
import shardopt.transport.assembly
import shardopt.transport.copies
from shardopt.backends.base import ALL_FINITE, address_of
from shardopt.backends.cpu.backend import CpuBackend
from shardopt.backends.cpu.kernel import CpuKernel
from shardopt.transport.mpi import MpiTransport
from tests.support.device_queue import QUEUE, OrderedFlags, note
from tests.support.order import DEVICE, DOWN, UP, OrderError


class DeviceArray:
    """An array of the device, which passes for one of CuPy's.

    Args:
        memory: The same as a NumPy array, for the device's eyes only.
    """

    __module__ = "cupy"

    def __init__(self, memory):
        self._memory = memory

    @property
    def __cuda_array_interface__(self):
        return self._memory.__array_interface__ | {"version": 3}

    def __dlpack_device__(self):
        return self._memory.__dlpack_device__()

    def __dlpack__(self, **options):
        return self._memory.__dlpack__(**options)

    dtype = property(lambda self: self._memory.dtype)
    shape = property(lambda self: self._memory.shape)
    strides = property(lambda self: self._memory.strides)
    flags = property(lambda self: self._memory.flags)
    ndim = property(lambda self: self._memory.ndim)
    size = property(lambda self: self._memory.size)
    nbytes = property(lambda self: self._memory.nbytes)
    itemsize = property(lambda self: self._memory.itemsize)

    def __len__(self):
        return len(self._memory)

    def __getitem__(self, index):
        part = self._memory[index]
        assert isinstance(part, np.ndarray), "elements are the device's"
        return type(self)(part)

    def reshape(self, *shape):
        return type(self)(_same_memory(self._memory.reshape(*shape), self._memory))

    def view(self, dtype):
        return type(self)(self._memory.view(dtype))

    def copy(self):
        memory = np.empty_like(self._memory)
        QUEUE.put("copy", lambda: np.copyto(memory, self._memory), reads=[self._memory])
        return DeviceArray(memory)

    def __repr__(self):
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype})"


def _same_memory(array, like):
    assert not like.size or np.may_share_memory(array, like)
    return array


def memory_of(array):
    """Return the memory of an array of the device, or a NumPy array itself; waits for the device.

    It is none of the device's work: nobody checks what is done to it.
    """
    if isinstance(array, DeviceArray):
        QUEUE.wait()
        return array._memory
    return array


def values_of(array):
    """Return a copy of an array of the device, as a framework would read it."""
    assert isinstance(array, DeviceArray)
    values = array.copy()
    QUEUE.wait()
    return values._memory


def fill(array, values):
    """Write values into an array, as a framework would, in its kernels if it is on the device."""
    if isinstance(array, np.ndarray):
        array[...] = values
        return
    memory, values = array._memory, np.array(values)
    _count_write(array)
    QUEUE.put("fill", lambda: np.copyto(memory, values, casting="unsafe"), writes=[memory])


def change(array, function):
    """Write what a function makes of its values into an array of the device."""
    memory = array._memory

    def work():
        memory[...] = function(memory)

    _count_write(array)
    QUEUE.put("change", work, reads=[memory], writes=[memory])


def _count_write(array):
    address = address_of(array)
    QUEUE.versions[address] = QUEUE.versions.get(address, 0) + 1


class DeviceKernel:
    """The CPU's kernel on arrays of the device.

    Args:
        is_late: Whether what updates have poisoned is reported one call late.
        make_kernel: Makes the kernel that computes.
    """

    def __init__(self, *, is_late=False, make_kernel=CpuKernel):
        self._kernel = make_kernel()
        self.piece_numel = self._kernel.piece_numel
        self.prepare = self._kernel.prepare
        self.close = self._kernel.close
        self._found = [ALL_FINITE] * is_late

    def take_poisoned(self):
        self._found.append(self._kernel.take_poisoned())
        return self._found.pop(0)

    def update(self, sources, targets, state, plan):
        arrays = {key: inside(array) for key, array in state.items()}
        here = plan.span.slice
        touched = [array[here] for array in arrays.values()]
        reads, writes = sources.part(plan.span), targets.part(plan.span)
        QUEUE.put(
            "update",
            lambda: self._kernel.update(sources, targets, arrays, plan),
            reads=[reads, writes[:1], *touched],
            writes=[writes, *touched],
        )

    def reduce(self, sources, out, span, square_sums, factor=1.0):
        sums = None if out is None else inside(out)
        QUEUE.put(
            "reduce",
            lambda: self._kernel.reduce(sources, sums, span, square_sums, factor),
            reads=[sources.part(span)],
            writes=[each for each in (sums, square_sums) if each is not None],
        )


def inside(array):
    """Return the memory of an array that the device addresses, for its work."""
    return array._memory if isinstance(array, DeviceArray) else array


class CopyQueue:
    """Copies that take their turn in the device's work, but are ordered with it as others would be.

    Args:
        kind: Which of the two queues for copies this is.
    """

    def __init__(self, kind):
        self._kind, self._clocks = kind, QUEUE.order.clocks

    def fork(self):
        np.maximum(*self._clocks[[self._kind, DEVICE]], out=self._clocks[self._kind])

    def copy(self, target, source):
        to, values = inside(target), inside(source)
        assert to.shape == values.shape
        assert to.dtype == values.dtype
        work = functools.partial(np.copyto, to, values)
        QUEUE.put("copy", work, reads=[values], writes=[to], kind=self._kind)

    def event(self):
        return QUEUE.event(self._kind)

    def join(self):
        np.maximum(*self._clocks[[self._kind, DEVICE]], out=self._clocks[DEVICE])


class ArenaDevice:
    """A device in node memory; implements ``Device``.

    Args:
        arena: The memory of the node.
        has_peers: Whether ranks address each other's devices.
        kernel: Options of ``DeviceKernel``.

    Attributes:
        queues: Those of the framework that have been entered.
    """

    def __init__(self, arena, *, has_peers=True, **kernel):
        self.arena = arena
        self.has_peers = has_peers
        self.kernel = DeviceKernel(**kernel)
        self.queues = []
        self._copy_kinds = iter((DOWN, UP))
        self._table = QUEUE.order.table(arena)
        self._blocks = []  # a weak reference to each, and its bytes

    @property
    def nbytes(self):
        """The bytes of memory that arrays refer to."""
        return sum(nbytes for block, nbytes in self._blocks if block() is not None)

    def blocks(self, arena, nbytes):
        size, rank = arena.comm.size, arena.comm.rank
        memory = arena.allocate(nbytes * size).memory
        parts = [memory[i * nbytes : (i + 1) * nbytes] for i in range(size)]
        if not self.has_peers:
            parts = [part if i == rank else part[:0] for i, part in enumerate(parts)]
        self._blocks.append((weakref.ref(memory), nbytes))
        return [DeviceArray(part) for part in parts]

    def zeros(self, nbytes):
        memory = np.zeros(nbytes, np.uint8)
        self._blocks.append((weakref.ref(memory), nbytes))
        return DeviceArray(memory)

    def host_zeros(self, numel, dtype):
        return np.zeros(numel, dtype)

    def copy(self, target, source):
        assert target.shape == source.shape
        assert target.dtype == source.dtype
        to, values = inside(target), inside(source)
        QUEUE.put("copy", lambda: np.copyto(to, values), reads=[values], writes=[to])

    def duplicate(self, array):
        return array.copy()

    def zero(self, array):
        memory = inside(array)
        QUEUE.put("zero", lambda: memory.fill(0), writes=[memory])

    def scale(self, array, factor):
        memory = inside(array)

        def work():
            memory[...] *= memory.dtype.type(factor)

        QUEUE.put("scale", work, reads=[memory], writes=[memory])

    def event(self):
        return QUEUE.event()

    def wait(self):
        QUEUE.wait()

    def host(self, array):
        QUEUE.order.sync()
        note("host", [array], by_host=True)
        QUEUE.wait()
        return inside(array).copy()

    def pin(self, array):
        assert isinstance(array, np.ndarray)

    def copy_queue(self):
        return CopyQueue(next(self._copy_kinds))

    def publish(self):
        QUEUE.run()
        self._table.publish(QUEUE.order)

    def acquire(self):
        self._table.acquire(QUEUE.order)

    def enter(self, queue):
        self.queues.append(queue)

    def close(self):
        QUEUE.run()
        self.kernel.close()


class HostBackend(CpuBackend):
    """The CPU's backend, whose accesses to node memory are checked as well."""

    def __init__(self, threads):
        super().__init__(threads)
        self.kernel = _HostKernel(threads)

    def copy(self, target, source):
        note("copy", [source], by_host=True)
        note("copy", [target], writes=True, by_host=True)
        super().copy(target, source)

    def zero(self, array):
        note("zero", [array], writes=True, by_host=True)
        super().zero(array)


class _HostKernel(CpuKernel):
    def update(self, sources, targets, state, plan):
        touched = [array[plan.span.slice] for array in state.values()]
        params = targets.part(plan.span)
        note("update", [sources.part(plan.span), params, *touched], by_host=True)
        note("update", [params, *touched], writes=True, by_host=True)
        super().update(sources, targets, state, plan)

    def reduce(self, sources, out, span, square_sums, factor=1.0):
        note("reduce", [sources.part(span)], by_host=True)
        if out is not None:
            note("reduce", [out], writes=True, by_host=True)
        super().reduce(sources, out, span, square_sums, factor)


class HostTransport(MpiTransport):
    """Messages between nodes, which the host sends and receives."""

    def post_send(self, array, node, tag):
        note("send", [array], by_host=True)
        return super().post_send(array, node, tag)

    def post_receive(self, array, node, tag):
        note("receive", [array], writes=True, by_host=True)
        return super().post_receive(array, node, tag)

    def post_broadcast(self, array, root):
        note("broadcast", [array], writes=self.node != root, by_host=True)
        return super().post_broadcast(array, root)


def on_device(values):
    """Return a copy of an array on the device."""
    values = np.array(values)
    memory = np.empty(max(1, values.size), values.dtype)[: values.size].reshape(values.shape)
    memory[...] = values
    return DeviceArray(memory)


@contextmanager
def arena_devices(monkeypatch, kind=None, **options):
    """Make optimizers take a device for every parameter that is on one; ``ArenaDevice`` for None.

    Raises:
        OrderError: Nothing has ordered accesses to node memory, so far; they are the test's errors.
    """
    devices = []

    def make_device(name, arena):
        devices.append((kind or ArenaDevice)(arena, **options))
        return devices[-1]

    with monkeypatch.context() as patched:
        patched.setattr(shardopt.core.parts, "make_device", make_device)
        patched.setattr(shardopt.core.parts, "CpuBackend", HostBackend)
        patched.setattr(shardopt.transport.assembly, "MpiTransport", HostTransport)
        patched.setattr(shardopt.transport.copies, "NodeFlags", OrderedFlags)
        yield devices


@contextlib.contextmanager
def in_order():
    """Check the order of all accesses to node memory inside.

    Raises:
        OrderError: Nothing has ordered some.
    """
    QUEUE.order.take_errors()
    yield
    QUEUE.run()
    if errors := QUEUE.order.take_errors():
        raise OrderError("\n".join(errors[:5]))
