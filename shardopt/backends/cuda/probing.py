"""Trying out the GPU of this process, and whether the ranks of a node reach each other's GPUs.

[Note: direct or staged]
On GPUs, the owner of a shard reads the gradients of its node's other ranks, and writes their
parameters, in the memory of their GPUs, which it has opened by CUDA's interprocess handles: that is
*direct*. Where that does not work, the ranks are *staged*: what they exchange passes through pinned
memory of the node. Only the addresses differ, and the bits are the same. What the driver reports of
peer access proves nothing, as it may be granted and yet fail, for example between containers. So
each rank opens the memory of every other, waits for its event, writes to it and reads what others
wrote. What one rank cannot do, none does.

Between nodes everything is staged. Whether MPI takes pointers to the memory of a GPU cannot be
tried soundly in a running job: MPI's own answer (``MPIX_Query_cuda_support``) may be wrong in
either direction, a try that fails is a segmentation fault, and a child process that could survive
it is no rank of the job. It would inherit the parent's connection to the launcher, and could send
to itself at best, which does not show what the network takes.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from mpi4py import MPI

from shardopt.backends.cuda.peers import (
    Device,
    Peers,
    Problem,
    Trial,
    conclude,
    find_slurm_binding,
)
from shardopt.comm.failure import FailurePolicy
from shardopt.comm.waiting import deadline

_Handle = tuple[bytes, bytes]  # of memory and of an event

_BLOCK_NBYTES = 2 << 20  # pages of a block's own: the driver puts several smaller ones into one
_SLOT_NBYTES = 16


class _DeviceMemory:
    """A block of memory on this rank's GPU, and the calls that reach the blocks of others.

    Calls return when what they do is done. Each may raise CUDA's errors, or CuPy's. The block is
    released with this object.

    Args:
        number: Of the device, among those that this process sees.
        nbytes: Length of the block.

    Attributes:
        device: The GPU.
        address: Where the block begins.
        handle: What other processes open it by, with an event that has been recorded.
    """

    def __init__(self, number: int, nbytes: int) -> None:
        import cupy

        self._runtime = cupy.cuda.runtime
        self._context = cupy.cuda.Device(number)
        self.device = describe_device(number)
        with self._context:
            # From cudaMalloc itself: a handle is that of a whole allocation, and pools have none.
            self._block = cupy.cuda.Memory(nbytes)
            self._event = cupy.cuda.Event(block=False, disable_timing=True, interprocess=True)
            self._event.record()
            self._runtime.deviceSynchronize()
            self.address: int = self._block.ptr
            self.handle: _Handle = (
                self._runtime.ipcGetMemHandle(self.address),
                self._runtime.ipcGetEventHandle(self._event.ptr),
            )

    def reaches(self, device: Device) -> bool | None:
        """Return whether the driver reports peer access; None if it does not see the device."""
        try:
            peer = self._runtime.deviceGetByPCIBusId(device.bus_id)
        except self._runtime.CUDARuntimeError:
            return None
        if peer == self.device.number:
            return True
        return bool(self._runtime.deviceCanAccessPeer(self.device.number, peer))

    def open(self, handle: bytes) -> int:
        """Return the address of another's block in this process."""
        with self._context:
            address: int = self._runtime.ipcOpenMemHandle(handle)
            return address

    def wait_for(self, handle: bytes) -> None:
        """Have the default stream wait for another's event."""
        with self._context:
            event = self._runtime.ipcOpenEventHandle(handle)
            try:
                self._runtime.streamWaitEvent(0, event, 0)
            finally:
                self._runtime.eventDestroy(event)

    def write(self, address: int, values: bytes) -> None:
        """Write to a block."""
        self._copy(address, np.frombuffer(values, np.uint8).ctypes.data, len(values))

    def read(self, address: int, nbytes: int) -> bytes:
        """Read from a block."""
        values = np.zeros(nbytes, np.uint8)
        self._copy(values.ctypes.data, address, nbytes)
        return values.tobytes()

    def close(self, address: int) -> None:
        """Close what ``open`` returned."""
        with self._context:
            self._runtime.ipcCloseMemHandle(address)

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        with self._context:
            self._runtime.memcpy(target, source, nbytes, self._runtime.memcpyDefault)
            self._runtime.deviceSynchronize()


def probe_peers(
    node_comm: MPI.Intracomm, device: int, timeout_s: float, failure: FailurePolicy
) -> Peers:
    """Find out whether the ranks of a node can use the memory of each other's GPUs.

    Every rank takes part until the end, whatever fails, and returns the same. Nothing that CUDA or
    CuPy raise comes through: it is the reason for not being direct. What was opened is closed, and
    then released, when this returns. A single rank has nobody to reach, and tries nothing.

    Collective: every rank of ``node_comm``.

    Args:
        node_comm: The ranks of the node.
        device: The number of this rank's GPU, among those that it sees.
        timeout_s: Longest time for all of it, ``ShardPolicy.timeout_s``.
        failure: What to do if it takes longer; calls of CUDA cannot be given up.
    """
    with deadline(timeout_s, "The probe of the node's GPUs", failure):
        return try_peers(node_comm, device)


def try_peers(node_comm: MPI.Intracomm, device: int) -> Peers:
    """Do what ``probe_peers`` does, for a caller that has a deadline of its own.

    Collective: every rank of ``node_comm``.
    """
    if node_comm.size == 1:
        return Peers(True)
    attempt = _Attempt(node_comm.rank, node_comm.size)
    offers = node_comm.allgather(attempt.offer(device))
    if None not in offers:
        attempt.open_and_write(offers)
        written = node_comm.allgather(attempt.written)  # all is written before it is read
        attempt.read_and_close(offers, written)
    trials = node_comm.allgather(attempt.result())  # all have closed before a block is released
    return conclude(trials)


class _Attempt:
    """One rank's part in the probe: what fails is noted, and the rank goes on.

    Each block has a slot for each rank. What a rank writes there depends on both of them, so that
    neither a block in the place of another, nor what was in memory before, passes for it.

    Args:
        rank: This rank on its node.
        size: Number of ranks there.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._memory: _DeviceMemory | None = None
        self._blocks: dict[int, int] = {}  # addresses by rank
        self._problems: list[Problem] = []
        self.written: list[int] = []

    def offer(self, device: int) -> "_Offer | None":
        """Allocate a block, and return what others need to know of it; None if that failed."""
        with self._trying("share", None):
            self._memory = _DeviceMemory(device, _BLOCK_NBYTES)
            return secrets.token_bytes(_SLOT_NBYTES), self._memory.handle, self._memory.device
        return None

    def open_and_write(self, offers: "list[_Offer]") -> None:
        """Open all blocks, and write to this rank's slot in each."""
        memory = self._memory
        assert memory is not None
        self._blocks[self._rank] = memory.address  # a process cannot open its own handle
        for rank, (_, handle, device) in enumerate(offers):
            if rank != self._rank:
                with self._trying("open", rank, device):
                    self._blocks[rank] = memory.open(handle[0])
                with self._trying("wait for what is written to", rank):
                    memory.wait_for(handle[1])
        for rank, address in self._blocks.items():
            with self._trying("write to", rank):
                memory.write(
                    address + self._rank * _SLOT_NBYTES, self._mark(offers, self._rank, rank)
                )
                self.written.append(rank)

    def read_and_close(self, offers: "list[_Offer]", written: list[list[int]]) -> None:
        """Read from all blocks what ranks have written there, and close them."""
        memory = self._memory
        assert memory is not None
        for rank, address in self._blocks.items():
            writers = [writer for writer in range(self._size) if rank in written[writer]]
            with self._trying("read", rank):
                values = memory.read(address, self._size * _SLOT_NBYTES)
                for writer in writers:
                    start = writer * _SLOT_NBYTES
                    if values[start : start + _SLOT_NBYTES] != self._mark(offers, writer, rank):
                        raise _DifferentBytesError(
                            f"not the bytes that rank {writer} of its node wrote"
                        )
        for rank, address in self._blocks.items():
            if rank != self._rank:
                with self._trying("close", rank):
                    memory.close(address)

    def result(self) -> Trial:
        """Return what this rank found."""
        return Trial(
            rank=MPI.COMM_WORLD.rank,
            device=self._memory.device if self._memory else None,
            namespace=read_pid_namespace(),
            slurm_binding=find_slurm_binding(os.environ),
            problems=tuple(self._problems),
        )

    @staticmethod
    def _mark(offers: "list[_Offer]", writer: int, owner: int) -> bytes:
        seed, size = offers[writer][0], _SLOT_NBYTES
        return hashlib.blake2b(owner.to_bytes(4, "little"), digest_size=size, key=seed).digest()

    @contextmanager
    def _trying(
        self, action: str, peer: int | None, device: Device | None = None
    ) -> Iterator[None]:
        """Note what the body raises."""
        peer = None if peer == self._rank else peer
        try:
            yield
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            self._problems.append(Problem(action, peer, told, self._reaches(device)))

    def _reaches(self, device: Device | None) -> bool | None:
        try:
            return self._memory.reaches(device) if self._memory and device else None
        except Exception:  # this is asked for the sake of a better message only
            return None


_Offer = tuple[bytes, _Handle, Device]


class _DifferentBytesError(Exception):
    """Memory holds other bytes than were written to it."""


def read_pid_namespace() -> str:
    """Return the PID namespace of this process, or an empty string if it is not known."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def describe_device(number: int) -> Device:
    """Describe a GPU that this process sees; raises CUDA's errors."""
    import cupy

    runtime = cupy.cuda.runtime
    properties: Mapping[str, Any] = runtime.getDeviceProperties(number)
    return Device(
        number=number,
        name=properties["name"].decode(),
        uuid=bytes(properties["uuid"]).hex(),
        bus_id=runtime.deviceGetPCIBusId(number),
        nbytes=int(properties["totalGlobalMem"]),
        capability=f"{properties['major']}.{properties['minor']}",
    )
