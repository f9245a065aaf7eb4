"""A device whose copies run beside the host's work, as those of a GPU do: early, late, or as told.

What it holds is node memory, as with ``ArenaDevice``. Its own queue is the host, so nothing
goes wrong if copies are not ordered with it; instead the device checks that they are.
"""

import queue
import threading
import time

import numpy as np

from tests.support.arena_device import ArenaDevice, inside
from tests.support.device_queue import QUEUE

PATIENCE_S = 60


class QueuedDevice(ArenaDevice):
    """Implements ``Device``.

    Args:
        arena: The memory of the node.
        is_lazy: Whether copies are made as late as an event or the device's own work allows, rather
            than by a thread for each queue.
        gate: Called with the name of a queue and the number of a copy before it is made.
        rate: Bytes that a link carries each way in a second, for benchmarks; None for any number.

    Attributes:
        log: The copies in the order in which they were made: the name of the queue, and the bytes.
    """

    def __init__(self, arena, *, is_lazy=False, gate=None, rate=None, **options):
        super().__init__(arena, **options)
        self.is_lazy = is_lazy
        self.gate = gate
        self.rate = rate
        self.log = []
        self._names = iter(("down", "up"))
        self._copy_queues = []
        self.num_done = 0  # by the device's own queue

    def copy(self, target, source):
        self._begin_work()
        self.carry(target, source)

    def carry(self, target, source):
        """Copy at the rate of the link."""
        start = time.perf_counter()
        np.copyto(inside(target), inside(source))
        if self.rate is not None:
            time.sleep(max(0.0, start + target.nbytes / self.rate - time.perf_counter()))

    def zero(self, array):
        self._begin_work()
        inside(array)[...] = 0

    def scale(self, array, factor):
        self._begin_work()
        memory = inside(array)
        memory *= memory.dtype.type(factor)

    def host(self, array):
        self._begin_work()
        return inside(array).copy()

    def enter(self, queue):
        self._begin_work()
        super().enter(queue)

    def _begin_work(self):
        QUEUE.run()  # what the framework has done
        self.num_done += 1
        assert all(each.is_joined for each in self._copy_queues if each.name == "up")

    def copy_queue(self):
        kind = LazyQueue if self.is_lazy else ThreadedQueue
        self._copy_queues.append(kind(self, next(self._names)))
        return self._copy_queues[-1]

    def close(self):
        super().close()
        for each in self._copy_queues:
            each.close()

    def nbytes(self, name):
        """Return the bytes copied in a queue so far."""
        return sum(nbytes for queue_name, nbytes in self.log if queue_name == name)


class _Queue:
    def __init__(self, device, name):
        self.name = name
        self._device = device
        self._num_copies = 0
        self.is_joined = True
        self._forked_at = 0

    def fork(self):
        QUEUE.run()
        self._forked_at = self._device.num_done

    def copy(self, target, source):
        assert self._forked_at == self._device.num_done, "what is copied may not be there yet"
        assert target.shape == source.shape
        self.is_joined = False
        self._add(target, source)
        self._num_copies += 1

    def join(self):
        self.event().wait()  # as the host is the queue that must wait
        self.is_joined = True

    def _make(self, number, target, source):
        if self._device.gate is not None:
            self._device.gate(self.name, number)
        self._device.carry(target, source)
        self._device.log.append((self.name, target.nbytes))


class ThreadedQueue(_Queue):
    """Copies are made by a thread."""

    def __init__(self, device, name):
        super().__init__(device, name)
        self._tasks = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _add(self, target, source):
        self._tasks.put((self._make, self._num_copies, target, source))

    def event(self):
        reached = Reached()
        self._tasks.put((reached.set,))
        return reached

    def close(self):
        self._tasks.put(None)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def _run(self):
        while (task := self._tasks.get()) is not None:
            task[0](*task[1:])


class Reached(threading.Event):
    """See ``backends.base.Event``."""

    def is_done(self):
        return self.is_set()

    def wait(self):
        assert super().wait(PATIENCE_S)


class LazyQueue(_Queue):
    """Copies are made by whoever asks for the second time whether they are done."""

    def __init__(self, device, name):
        super().__init__(device, name)
        self._waiting = []
        self._num_made = 0

    def _add(self, target, source):
        self._waiting.append((target, source))

    def event(self):
        return Asked(self, self._num_copies)

    def make(self, stop):
        """Make all copies up to number ``stop``."""
        while self._num_made < stop:
            self._make(self._num_made, *self._waiting.pop(0))
            self._num_made += 1

    def close(self):
        assert not self._waiting, "nobody has waited for these"


class Asked:
    """See ``backends.base.Event``."""

    def __init__(self, copies, stop):
        self._copies, self._stop = copies, stop
        self._num_asked = 0

    def is_done(self):
        self._num_asked += 1
        if self._num_asked > 1:
            self.wait()
        return self._num_asked > 1

    def wait(self):
        self._copies.make(self._stop)
