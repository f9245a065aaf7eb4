"""Blocks of memory and events of GPUs that the ranks of a node share."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mpi4py import MPI

from shardopt._typing import Array
from shardopt.backends.cuda.gpu import Gpu
from shardopt.comm.consensus import attempt
from shardopt.comm.node_memory.arena import Arena
from shardopt.errors import KernelError, SharedMemoryError
from shardopt.layout.padding import round_up

_PAGE_NBYTES = 2 << 20  # of a GPU: smaller blocks would share one, and be opened with others


@dataclass(slots=True)
class _Block:
    """A block of each rank.

    Attributes:
        gpu: That of this rank.
        memory: This rank's own block, which must outlive what others do with it.
        opened: For each rank whose block is open here, its address, and what its arrays keep alive.
    """

    gpu: Gpu
    memory: Any
    opened: dict[int, tuple[int, weakref.ref["_Owner"]]] = field(default_factory=dict)


class _Owner:
    """Kept alive by the arrays of a block.

    Args:
        memory: Their memory, if it is this process's.
    """

    def __init__(self, memory: Any = None) -> None:
        self.memory = memory


class NodeGpus:
    """The memory and events of GPUs that ranks have opened; there is one for each arena.

    [Note: closed before freed]
    A block is this rank's own allocation, which other ranks open. It must not be freed before all
    of them have closed it. So a rank closes blocks once nothing here uses their arrays any more,
    and keeps its own until all others have told that they have closed it. Both happen in
    ``reclaim``, which runs whenever the arena reclaims its own memory. After that a block lives as
    long as its arrays, as any other: users keep their parameters when they close an optimizer.
    Optimizers that were dropped, or could not be built on all ranks, leave their blocks to the next
    ``reclaim``. If a rank dies, all die; the driver then takes back what they had.

    Events are made once, and stay: their handles would be used up otherwise.

    Args:
        node_comm: The ranks of the node.
    """

    def __init__(self, node_comm: MPI.Intracomm) -> None:
        self._comm = node_comm
        self._blocks: dict[int, _Block] = {}
        self._num_blocks = 0
        self._marks: dict[int, tuple[Any, bytes]] = {}  # own ones, by number of the GPU
        self._opened_marks: dict[bytes, Any] = {}

    @classmethod
    def of(cls, arena: Arena) -> "NodeGpus":
        """Return that of an arena."""
        found = _of_arenas.get(arena)
        if found is None:
            found = _of_arenas[arena] = cls(arena.comm)
            arena.reclaimers.append(found.reclaim)
        return found

    def allocate(self, gpu: Gpu, nbytes: int) -> list[Array]:
        """Allocate zeros on the GPU of every rank. Collective.

        Args:
            gpu: That of this rank.
            nbytes: Length of each.

        Returns:
            [nbytes] of each rank.

        Raises:
            SharedMemoryError: There is no room on some GPU, or it cannot be opened; on every rank.
        """
        self.reclaim()
        memory, error = attempt(gpu.allocate, round_up(max(1, nbytes), _PAGE_NBYTES))
        handle = None
        if memory is not None:
            handle, error = attempt(gpu.export, memory)
        require_room(self._comm, error, nbytes)
        block = _Block(gpu, memory)
        owners = [_Owner() for _ in range(self._comm.size)]
        owners[self._comm.rank].memory = memory
        handles = self._comm.allgather(handle)
        _, error = attempt(self._open, block, handles, owners)
        try:
            require_room(self._comm, error, nbytes)
        finally:
            self._blocks[self._num_blocks] = block  # closed by the next reclaim if one has failed
            self._num_blocks += 1
        assert memory is not None
        addresses = {rank: address for rank, (address, _) in block.opened.items()}
        addresses[self._comm.rank] = memory.ptr
        return [gpu.array(addresses[rank], nbytes, owner) for rank, owner in enumerate(owners)]

    def _open(self, block: _Block, handles: Sequence[bytes], owners: Sequence[_Owner]) -> None:
        for rank, handle in enumerate(handles):
            if rank != self._comm.rank:  # a process cannot open its own
                block.opened[rank] = block.gpu.open(handle), weakref.ref(owners[rank])

    def reclaim(self) -> None:
        """Close and free what is no longer in use; see [Note: closed before freed]. Collective.

        Raises:
            KernelError: Some rank cannot; on every rank.
        """
        _, error = attempt(self._close_unused)
        closed = {number for number, block in self._blocks.items() if not block.opened}
        for number in set.intersection(*self._comm.allgather(closed)):
            del self._blocks[number]
        if first := first_error(self._comm, error):
            raise KernelError(f"memory of another rank's GPU could not be closed: {first}")

    def _close_unused(self) -> None:
        for block in self._blocks.values():
            unused = [rank for rank, (_, alive) in block.opened.items() if alive() is None]
            if unused:
                block.gpu.synchronize()  # what was handed out may still read it
            for rank in unused:
                block.gpu.close(block.opened.pop(rank)[0])

    def _require_mark(self, error: Exception | None) -> None:
        if first := first_error(self._comm, error):
            raise KernelError(
                f"every rank of the node must wait for events of the others' GPUs; got {first}. "
                "See shardopt doctor."
            ) from error

    def exchange_marks(self, gpu: Gpu) -> tuple[Any, list[Any]]:
        """Return this rank's event, and those of the others. Collective.

        Raises:
            KernelError: Some rank cannot open them; on every rank.
        """
        error = None
        if gpu.number not in self._marks:
            made, error = attempt(gpu.mark)
            if made is not None:
                self._marks[gpu.number] = made
        self._require_mark(error)
        mark, handle = self._marks[gpu.number]
        handles = self._comm.allgather(handle)
        others = [each for rank, each in enumerate(handles) if rank != self._comm.rank]
        for each in others:
            if each not in self._opened_marks and error is None:
                opened, error = attempt(gpu.open_mark, each)
                self._opened_marks |= {} if error else {each: opened}
        self._require_mark(error)
        return mark, [self._opened_marks[each] for each in others]


_of_arenas: "weakref.WeakKeyDictionary[Arena, NodeGpus]" = weakref.WeakKeyDictionary()


def first_error(comm: MPI.Intracomm, error: Exception | None) -> str | None:
    """Return the error of the lowest rank that has one, as text, or None. Collective."""
    errors = comm.allgather(None if error is None else str(error))
    return next((each for each in errors if each is not None), None)


def require_room(comm: MPI.Intracomm, error: Exception | None, nbytes: int) -> None:
    """Raise on all ranks if one could not allocate or open memory on GPUs. Collective.

    Raises:
        SharedMemoryError: See above.
    """
    if first := first_error(comm, error):
        raise SharedMemoryError(
            f"every rank of the node must have {nbytes:,} more bytes on its GPU; got {first}. "
            'Start fewer ranks for each GPU, or set policy.offload="cpu"; see shardopt doctor.'
        ) from error
