"""The queue of a rank's device: its work is done as late as may be, and its order checked."""

import math

import numpy as np

from shardopt.backends.base import Rows, address_of
from shardopt.comm.flags import NodeFlags
from tests.support.order import DEVICE, HOST, Order


class Queue:
    """The work of this rank's device, that of the framework and that of optimizers.

    Attributes:
        order: Checks what it accesses.
        versions: How often frameworks have written to an array, by its address.
        num_done: Pieces of work that have been carried out.
    """

    def __init__(self):
        self.order = Order()
        self.versions = {}
        self.num_done = self._num_put = 0
        self._pending = []

    def put(self, what, work, *, reads=(), writes=(), kind=DEVICE):
        """Add work.

        Args:
            what: Its name, for messages.
            work: Carries it out.
            reads: Arrays, or rows, that it reads.
            writes: Likewise.
            kind: Which queue of the device it is in.
        """
        for arrays, is_write in ((reads, False), (writes, True)):
            for array in arrays:
                for run in runs_of(array):
                    self.order.access(run, what, writes=is_write, kind=kind)
        self._pending.append(work)
        self._num_put += 1

    def run(self):
        """Carry out everything."""
        while self._pending:
            self._pending.pop(0)()
            self.num_done += 1

    def wait(self):
        """Wait for everything."""
        self.run()
        self.order.sync()

    def event(self, kind=DEVICE):
        return QueueEvent(self, self._num_put, self.order.clocks[kind].copy())


class QueueEvent:
    def __init__(self, queue, position, clock):
        self._queue, self._position, self._clock = queue, position, clock
        self._looks = 0

    def is_done(self):
        self._looks += 1  # the device goes on while the host looks at it again and again
        if self._looks <= 2 and self._queue.num_done < self._position:
            return False
        self.wait()
        return True

    def wait(self):
        self._queue.run()
        order = self._queue.order
        np.maximum(order.host, self._clock, out=order.host)


class OrderedFlags(NodeFlags):
    """Flags that hand on what the host of a rank knows to those who see them, as fences do.

    Whoever looks sees the flags of others as they were at its last look, as nothing makes them
    visible any sooner: so what does not wait for a flag is found, however ranks are timed.
    """

    def __init__(self, arena, num_fields):
        super().__init__(arena, num_fields)
        self._table, self._rank = QUEUE.order.table(arena), arena.comm.rank
        shape = arena.comm.size, QUEUE.order.host.size
        memory = arena.allocate(8 * math.prod(shape)).memory[: 8 * math.prod(shape)]
        self._shared = self.all, memory.view(np.int64).reshape(shape)
        self._seen = [np.zeros_like(each) for each in self._shared]
        self.all = self._seen[0].copy()
        self.mine = self.all[self._rank]

    def publish(self):
        flags, clocks = self._shared
        with self._table.locked():
            flags[self._rank], clocks[self._rank] = self.mine, QUEUE.order.host

    def acquire(self):
        order, (flags, clocks) = QUEUE.order, self._seen
        with self._table.locked():
            self._seen = [each.copy() for each in self._shared]
        flags[self._rank] = self.mine
        self.all[...] = flags
        np.maximum(order.host, clocks.max(axis=0), out=order.host)


def runs_of(array):
    """Return the addresses and bytes of an array, or of rows."""
    if isinstance(array, Rows):
        nbytes = array.numel * array.dtype.itemsize
        return [(int(address), nbytes) for address in array.addresses]
    return [(address_of(array), array.nbytes)] if array.size else []


def note(what, arrays, *, writes=False, by_host=False):
    """Have the order of accesses checked."""
    for array in arrays:
        for run in runs_of(array):
            kind = HOST if by_host else DEVICE
            QUEUE.order.access(run, what, writes=writes, kind=kind)


QUEUE = Queue()
