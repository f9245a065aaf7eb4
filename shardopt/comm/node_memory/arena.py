"""One unnamed file per node, mapped by all its ranks, and the ranges of it that are in use.

[Note: when stores become visible]
What one rank stores may be read by another only after three things in this order: the writer's
``full_fence()``, a collective that the writer has entered and the reader has left, and the reader's
``full_fence()``. ``step()`` goes through them twice: on its way in, after which gradients and
replaced parameters can be read, and on its way out, after which updated parameters can be read and
gradients may be overwritten. In between, every element has one writer: parameters, optimizer state
and summed gradients are written by the owner of their shard.

Gradients that leave while backward runs become readable by a flag in place of the collective: the
writer's fence, its store to a flag of ``NodeFlags``, the reader's load of that flag, the reader's
fence; see [Note: gradients sent during backward]. So do gradients and parameters that are copied
beside updates, once the device has reported that a copy is done; see [Note: copies beside updates].
"""

import functools
import os
import secrets
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt.comm.node_memory.linux import (
    Mapping,
    drop_pages,
    has_data,
    make_memfd,
    map_again,
    map_file,
    punch_hole,
)
from shardopt.errors import SharedMemoryError
from shardopt.layout.padding import PAGE_NBYTES, PERIOD_NBYTES, round_up
from shardopt.layout.span import Span

_MIN_CHUNK_NBYTES = 1 << 20
_TOKEN_NBYTES = 16


class _Buffer:
    """Part of a mapping as an object that arrays are made of; they keep it and its arena alive."""

    def __init__(self, arena: "Arena", mapping: Mapping, span: Span) -> None:
        self._owners = arena, mapping
        self.__array_interface__ = {
            "data": (mapping.address + span.start, False),
            "shape": (span.numel,),
            "typestr": "|u1",
            "version": 3,
        }

    def array(self) -> NDArray[np.uint8]:
        """Return the bytes; every view of them keeps this object alive."""
        return np.asarray(self)


@dataclass(frozen=True, slots=True, eq=False)
class NodeMemory:
    """A range of the node's memory.

    Attributes:
        memory: [nbytes] the node's one copy, which all its ranks address.
        view: [nbytes] the same, but this rank's own to write to: a page that the rank writes to
            becomes a copy of its own. The same array as ``memory`` if none was asked for.
    """

    memory: NDArray[np.uint8]
    view: NDArray[np.uint8]


@dataclass(slots=True)
class _Chunk:
    """A part of the file and its mappings; ``free`` holds the ranges not in use, in order."""

    offset: int
    shared: Mapping
    private: Mapping | None
    free: list[Span]

    @property
    def addresses(self) -> Span:
        """Where it is mapped for all ranks to see, in this process."""
        return Span(self.shared.address, self.shared.address + self.shared.nbytes)

    def take(self, nbytes: int, alignment: int) -> Span | None:
        """Return a free range, which is in use from now on, or None if none is long enough."""
        for index, span in enumerate(self.free):
            start = round_up(span.start, alignment)
            if start + nbytes <= span.stop:
                rest = Span(span.start, start), Span(start + nbytes, span.stop)
                self.free[index : index + 1] = [part for part in rest if part]
                return Span(start, start + nbytes)
        return None

    def drop(self, span: Span) -> bool:
        """Drop the pages of a range that this rank has written to; whether that was possible."""
        assert self.private is not None
        return drop_pages(self.private.address + span.start, span.numel)

    def give_back(self, span: Span) -> None:
        """Add a range to those not in use."""
        merged: list[Span] = []
        for each in sorted([*self.free, span], key=lambda part: part.start):
            if merged and merged[-1].stop == each.start:
                merged[-1] = Span(merged[-1].start, each.stop)
            else:
                merged.append(each)
        self.free = merged


class _Range:
    """A range in use, as long as some array of it is alive on some rank.

    Args:
        chunk: The chunk it is in.
        span: Its bytes, counted from the start of the chunk.
        buffers: What arrays keep alive.
        on_death: Called once all of them are gone on this rank.
    """

    def __init__(
        self, chunk: _Chunk, span: Span, buffers: Sequence[_Buffer], on_death: Callable[[], object]
    ) -> None:
        self.chunk = chunk
        self.span = span
        self._num_alive = len(buffers)
        self._on_death = on_death
        self._references = [weakref.ref(buffer, self._note_death) for buffer in buffers]

    def _note_death(self, _: object) -> None:
        self._num_alive -= 1
        if not self._num_alive:
            self._on_death()


class Arena:
    """The memory of a node: ranges of one file in memory, in chunks that at least double.

    The file has no name and ends with the last process that maps it; nothing is left behind,
    however a job ends, and nothing is taken from /dev/shm. Memory never moves. A range of which no
    rank holds an array any more is released by the next ``reclaim``.

    Collective over the node: construction, ``allocate`` and ``reclaim``.

    Args:
        node_comm: The ranks of the node.

    Attributes:
        comm: As given.
        fd: The file.
        chunks: Its parts, each mapped by itself.
        reclaimers: Release what else the ranks share, along with this memory; alike on all ranks.
    """

    def __init__(self, node_comm: MPI.Intracomm) -> None:
        self.comm = node_comm
        self.fd, error = open_together(node_comm)
        if error is not None:
            raise SharedMemoryError(
                f"the ranks of a node could not map one file: {error}. Start them in one PID "
                "namespace as one user, or set policy.share_node=False."
            )
        self._nbytes = 0
        self.chunks: list[_Chunk] = []
        self.reclaimers: list[Callable[[], None]] = []
        self._ranges: dict[int, _Range] = {}
        self._num_ranges = 0
        self._unused: set[int] = set()  # ranges of which this rank holds no array any more
        weakref.finalize(self, os.close, self.fd)
        _watch_forks()
        _arenas.add(self)

    def allocate(self, nbytes: int, *, private: bool = False) -> NodeMemory:
        """Allocate zeros that all ranks of the node address.

        Collective over the node.

        Args:
            nbytes: Length; the same on every rank.
            private: Whether each rank gets a view of its own, too.
        """
        nbytes = round_up(max(1, nbytes), PAGE_NBYTES)
        alignment = PERIOD_NBYTES if nbytes >= PERIOD_NBYTES else PAGE_NBYTES
        chunk, span = self._take(nbytes, alignment, private)
        buffers = [_Buffer(self, chunk.shared, span)]
        if chunk.private is not None:
            buffers.append(_Buffer(self, chunk.private, span))
        on_death = functools.partial(self._unused.add, self._num_ranges)
        self._ranges[self._num_ranges] = _Range(chunk, span, buffers, on_death)
        self._num_ranges += 1
        arrays = [buffer.array() for buffer in buffers]
        return NodeMemory(arrays[0], arrays[-1])

    def trim(self, array: NDArray[Any]) -> None:
        """Release the whole pages of an array of node memory that is zero; it still reads as zero.

        Nobody else may write to it at the same time.
        """
        address = array.ctypes.data
        chunk = next((each for each in self.chunks if address in each.addresses), None)
        if chunk is None:
            return
        start = round_up(address, PAGE_NBYTES)
        nbytes = (address + array.nbytes) // PAGE_NBYTES * PAGE_NBYTES - start
        offset = chunk.offset + start - chunk.addresses.start
        if nbytes > 0 and has_data(self.fd, offset, nbytes) and not array.any():
            punch_hole(self.fd, offset, nbytes)

    def _take(self, nbytes: int, alignment: int, private: bool) -> tuple[_Chunk, Span]:
        chunks = [chunk for chunk in self.chunks if (chunk.private is not None) == private]
        taken = _take_from(chunks, nbytes, alignment)
        if taken is None:
            self.reclaim()  # which takes a collective, so only if there is no room
            taken = _take_from(chunks, nbytes, alignment)
        if taken is None:
            so_far = sum(chunk.shared.nbytes for chunk in chunks)
            chunk_nbytes = round_up(max(nbytes, so_far, _MIN_CHUNK_NBYTES), PERIOD_NBYTES)
            taken = _take_from([self._add_chunk(chunk_nbytes, private)], nbytes, alignment)
        assert taken is not None
        return taken

    def _add_chunk(self, nbytes: int, private: bool) -> _Chunk:
        """Make the file longer and map what is new.

        Raises:
            SharedMemoryError: Some rank cannot; on every rank.
        """
        chunk, error = None, None
        try:
            if self.comm.rank == 0:
                os.ftruncate(self.fd, self._nbytes + nbytes)
        except OSError as cause:
            error = cause
        self.comm.Barrier()  # the file is long enough now
        try:
            if error is None:
                chunk = self._map(nbytes, private)
        except OSError as cause:
            error = cause
        errors = self.comm.allgather(None if error is None else str(error))
        if first := next((each for each in errors if each is not None), None):
            raise SharedMemoryError(
                f"the ranks of a node must be able to map {nbytes:,} more bytes; got {first}. Lift "
                "the limit (ulimit -v, ulimit -f, vm.max_map_count), or start fewer ranks on the "
                "node."
            ) from error
        assert chunk is not None
        self._nbytes += nbytes
        self.chunks.append(chunk)
        return chunk

    def _map(self, nbytes: int, private: bool) -> _Chunk:
        shared, own = map_file(self.fd, self._nbytes, nbytes, private=False), None
        if private:
            own = map_file(self.fd, self._nbytes, nbytes, private=True)
        return _Chunk(self._nbytes, shared, own, [Span(0, nbytes)])

    def reclaim(self) -> None:
        """Release the ranges of which no rank holds an array any more. Collective."""
        for reclaim in self.reclaimers:
            reclaim()
        unused = sorted(set.intersection(*self.comm.allgather(set(self._unused))))
        if not unused:
            return
        for number in unused:
            self._unused.remove(number)
            chunk, span = (each := self._ranges.pop(number)).chunk, each.span
            if self.comm.rank == 0:
                punch_hole(self.fd, chunk.offset + span.start, span.numel)
            chunk.give_back(span)
            if chunk.private is not None and not chunk.drop(span):
                chunk.private.array[span.slice] = 0
        self.comm.Barrier()  # all of it is zero again


def _take_from(chunks: Sequence[_Chunk], nbytes: int, alignment: int) -> tuple[_Chunk, Span] | None:
    """Take a range from the first chunk with room; return None if there is none."""
    for chunk in chunks:
        if (span := chunk.take(nbytes, alignment)) is not None:
            return chunk, span
    return None


_arenas: "weakref.WeakSet[Arena]" = weakref.WeakSet()


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_leave_node)


def _leave_node() -> None:
    """Make what a forked child writes to node memory the child's own.

    A child inherits shared mappings, and a backward pass in it would add to the gradients of its
    parent. It goes on to see what the ranks write.
    """
    for arena in _arenas:
        for chunk in arena.chunks:
            map_again(chunk.shared, arena.fd, chunk.offset)


def can_share(comm: MPI.Intracomm) -> bool:
    """Return whether all ranks can map one file; the same on every rank. Collective."""
    fd, error = open_together(comm)
    if error is None:
        os.close(fd)
    return error is None


def open_together(comm: MPI.Intracomm) -> tuple[int, str | None]:
    """Make a file in memory on rank 0 and open it on the others. Collective.

    Returns:
        Its descriptor, or -1, and the reason why some rank could not open it, or None.
    """
    offer: tuple[int, int, bytes] | None = None
    fd, error = -1, None
    if comm.rank == 0:
        fd, token = make_memfd("shardopt"), secrets.token_bytes(_TOKEN_NBYTES)
        os.pwrite(fd, token, 0)
        offer = os.getpid(), fd, token
    pid, number, token = comm.bcast(offer)
    if comm.rank != 0:
        path = f"/proc/{pid}/fd/{number}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.pread(fd, _TOKEN_NBYTES, 0) != token:  # of another PID namespace
                error = f"{path} is another process's file"
        except OSError as cause:
            error = str(cause)
    errors: list[str | None] = comm.allgather(error)
    first = next((each for each in errors if each is not None), None)
    if comm.rank == 0:
        os.ftruncate(fd, 0)  # the token is gone
    if first is not None and fd >= 0:
        os.close(fd)
        fd = -1
    return fd, first
