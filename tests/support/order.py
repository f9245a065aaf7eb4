"""Is every access to node memory ordered behind those before it, by events, fences and flags alone?

Vector clocks: each rank has four workers, its host, the queue of its device, and two queues for
copies beside it, of which nobody knows before the device has joined them. A worker counts its own
work and knows how much of the others' is done before it. An access must know the last write to what
it touches, and a write also all reads since. A missing wait, event or fence is then found in every
run, however ranks are timed. Who wrote last, and who has read since, is kept for each block of 64
bytes, in memory that the ranks share.
"""

import contextlib
import fcntl
import math
import os
import traceback
import weakref

import numpy as np
from mpi4py import MPI

from shardopt.comm.node_memory.arena import Arena, open_together
from shardopt.comm.node_memory.linux import map_file

BLOCK_NBYTES = 64  # no two parameters are in one
_MAX_NBYTES = 256 << 20  # of an arena; the table takes memory only where it is used
_NUM_KEPT = 16  # ranks are at most one meeting apart
_PAGE = 4096
HOST, DEVICE, DOWN, UP = range(4)
_NAMES = "host", "device", "first copy queue", "second copy queue"


class OrderError(AssertionError):
    """Accesses that nothing orders."""


class Order:
    """The workers of this process, and what they know of all others."""

    def __init__(self):
        world = MPI.COMM_WORLD
        self.rank, self.num_ranks = world.rank, world.size
        self.clocks = np.zeros((len(_NAMES), len(_NAMES) * world.size), np.int64)
        self.host, self.queue = self.clocks[:DOWN]
        self.errors = []
        self._tables = weakref.WeakKeyDictionary()

    def table(self, arena):
        """Return the table of an arena. Collective over the node, the first time."""
        if arena not in self._tables:
            self._tables[arena] = _Table(arena, self.num_ranks)
        return self._tables[arena]

    def access(self, array, what, *, writes, kind=DEVICE):
        """Note an access to an array of node memory, if it is there; what is wrong is an error."""
        worker, clock = kind * self.num_ranks + self.rank, self.clocks[kind]
        if kind != HOST:
            np.maximum(clock, self.host, out=clock)  # work is done after it is handed out
        clock[worker] += 1
        address, nbytes = array
        for table in self._tables.values():
            found = table.access(address, nbytes, worker, clock, writes=writes)
            for verb, others in found.items():
                by = ", ".join(map(self._name_of, others))
                frames = traceback.extract_stack()
                inside = [f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in frames]
                self.errors.append(
                    f"{what} of {self._name_of(worker)}: {verb} by {by} before, and nothing orders "
                    f"the two; {' > '.join(inside[-9:-2])}"
                )

    def sync(self):
        """Let the host wait for the queue."""
        np.maximum(self.host, self.queue, out=self.host)

    def take_errors(self):
        """Return what was wrong since the last call."""
        errors, self.errors = self.errors, []
        return errors

    def _name_of(self, worker):
        return f"the {_NAMES[worker // self.num_ranks]} of rank {worker % self.num_ranks}"


class _Table:
    """The accesses to an arena; collective over the node."""

    def __init__(self, arena, num_ranks):
        self._arena = weakref.ref(arena)
        self._fd, error = open_together(arena.comm)
        assert error is None
        weakref.finalize(self, os.close, self._fd)
        width = 2 + len(_NAMES) * num_ranks  # who wrote, when; and when each has read
        kept_shape = _NUM_KEPT, num_ranks, 1 + 2 * len(_NAMES) * num_ranks
        kept = math.prod(kept_shape)
        numbers = _MAX_NBYTES // BLOCK_NBYTES * width + kept
        nbytes = -(-numbers * 8 // _PAGE) * _PAGE
        if arena.comm.rank == 0:
            os.ftruncate(self._fd, nbytes)
        arena.comm.Barrier()
        self._mapping = map_file(self._fd, 0, nbytes, private=False)
        memory = self._mapping.array.view(np.int64)[:numbers]
        self._blocks = memory[kept:].reshape(-1, width)
        self._published = memory[:kept].reshape(kept_shape)
        self._num_published = 0
        self._ranks = arena.comm.allgather(MPI.COMM_WORLD.rank)
        arena.allocate = self._allocate

    def _allocate(self, nbytes, *, private=False):
        """Forget who has used the memory before; ranks meet before they use it now."""
        given = Arena.allocate(self._arena(), nbytes, private=private)
        self._blocks[self._span(given.memory.ctypes.data, max(1, nbytes))] = 0
        return given

    def access(self, address, nbytes, worker, clock, *, writes):
        span = self._span(address, nbytes)
        if span is None:
            return {}
        with self.locked():
            rows = self._blocks[span]
            writer, when = rows[:, 0], rows[:, 1]
            found = {"written": {int(w) for w in writer[when > clock[writer]]}}
            if writes:
                found["read"] = {int(w) for w in np.nonzero((rows[:, 2:] > clock).any(axis=0))[0]}
                rows[:, 0], rows[:, 1], rows[:, 2:] = worker, clock[worker], 0
            else:
                rows[:, 2 + worker] = clock[worker]
        return {verb: sorted(others) for verb, others in found.items() if others}

    def publish(self, order):
        """Keep what this rank's workers know now, for those who meet it next."""
        self._num_published += 1
        row = self._published[self._num_published % _NUM_KEPT, order.rank]
        row[1:] = np.concatenate([order.host, order.queue])
        row[0] = self._num_published

    def acquire(self, order):
        """Learn what the workers of others knew when they published before this meeting."""
        rows = self._published[self._num_published % _NUM_KEPT]
        for rank in self._ranks:
            if rows[rank, 0] != self._num_published:
                order.errors.append(f"rank {rank} has not published before it met the others")
            host, queue = rows[rank, 1:].reshape(2, -1)
            np.maximum(order.host, host, out=order.host)
            np.maximum(order.queue, queue, out=order.queue)

    def _span(self, address, nbytes):
        """Return the blocks of a run of memory; None if it is not in the arena."""
        arena = self._arena()
        for chunk in arena.chunks if arena is not None else ():
            if nbytes and address in chunk.addresses:
                start = chunk.offset + address - chunk.addresses.start
                assert start + nbytes <= _MAX_NBYTES
                return slice(start // BLOCK_NBYTES, -(-(start + nbytes) // BLOCK_NBYTES))
        return None

    @contextlib.contextmanager
    def locked(self):
        """Keep the other ranks of the node out."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
