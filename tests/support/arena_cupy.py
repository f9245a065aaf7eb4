"""The calls of CuPy that look at GPUs, with the node's shared memory in the place of theirs."""

import ctypes
import signal
import sys
from types import SimpleNamespace

from shardopt.backends.cuda.peers import Device
from shardopt.comm.node_memory.arena import Arena
from shardopt.comm.node_memory.fence import full_fence

BLOCK_NBYTES = 4 << 20
H200 = Device(0, "NVIDIA H200", "ab01", "0000:19:00.0", 150 << 30, "9.0")
RECORDED, OPENED = BLOCK_NBYTES - 1, BLOCK_NBYTES - 1024  # flags at the end of a rank's block


class CUDARuntimeError(RuntimeError):
    """What CUDA answers."""


class ArenaCupy:
    """A CuPy on a node whose GPUs reach each other, apart from what a test breaks.

    Calls check their order: the device is current, memory is open while it is used, nothing is
    opened twice, and no block is released while another rank has it open.

    Collective: construction.

    Args:
        comm: The ranks of the node.
        num_devices: GPUs that each rank sees.
    """

    memcpyDefault = 4
    CUDARuntimeError = CUDARuntimeError

    def __init__(self, comm, num_devices=8):
        self.comm = comm
        self.num_devices = num_devices
        self.memory = Arena(comm).allocate(comm.size * BLOCK_NBYTES).memory
        self.base = self.memory.ctypes.data
        self.flaw = ""  # a call that fails, "lost write", "other block", "other bytes" or "hang"
        self.sees_others = True
        self.reachable = True
        self.current = []
        self.opened, self.events = [], []

    def install(self, monkeypatch):
        """Have ``import cupy`` find this."""
        cuda = SimpleNamespace(
            runtime=self,
            Device=lambda number: _Current(self, number),
            Memory=lambda nbytes: _Memory(self, nbytes),
            Event=lambda **settings: _Event(self, **settings),
        )
        nvrtc = SimpleNamespace(getVersion=lambda: (13, 0))
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(__version__="14.2.0", cuda=cuda))
        libs = SimpleNamespace(nvrtc=nvrtc)
        monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", libs)
        pathfinder = SimpleNamespace(find_nvidia_header_directory=lambda name: "/usr/include")
        monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(pathfinder=pathfinder))

    # -- what describes ---------------------------------------------------------------------------

    def driverGetVersion(self):
        return 13000

    def getDeviceCount(self):
        return self.num_devices

    def getDeviceProperties(self, number):
        self._fail_if("getDeviceProperties")
        assert number < self.num_devices
        name, nbytes = H200.name.encode(), H200.nbytes
        return {"name": name, "uuid": b"%d" % number, "totalGlobalMem": nbytes} | {
            "major": 9,
            "minor": 0,
        }

    def deviceGetPCIBusId(self, number):
        return f"0000:{number:02}:00.0"

    def deviceGetByPCIBusId(self, bus_id):
        if not self.sees_others:
            raise CUDARuntimeError("cudaErrorInvalidValue: invalid argument")
        return int(bus_id[5:7])

    def deviceCanAccessPeer(self, number, peer):
        assert number != peer
        return int(self.reachable)

    # -- what works -------------------------------------------------------------------------------

    def ipcGetMemHandle(self, address):
        self._fail_if("ipcGetMemHandle")
        assert address == self.address_of(self.comm.rank)
        return b"memory" + bytes([self.comm.rank]) * 58

    def ipcGetEventHandle(self, event):
        assert event == ~self.comm.rank
        return b"event." + bytes([self.comm.rank]) * 58

    def ipcOpenMemHandle(self, handle):
        if self.flaw == "hang":
            signal.pause()
        self._fail_if("ipcOpenMemHandle")
        assert handle[:6] == b"memory"
        owner = handle[-1]
        assert owner != self.comm.rank, "a process cannot open its own handle"
        assert owner not in self.opened
        self.opened.append(owner)
        self._flags(owner)[self.comm.rank] = 1
        return self.address_of(owner)

    def ipcOpenEventHandle(self, handle):
        self._fail_if("ipcOpenEventHandle")
        assert handle[:6] == b"event."
        full_fence()
        assert self.memory[handle[-1] * BLOCK_NBYTES + RECORDED] == 1
        self.events.append(~handle[-1])
        return self.events[-1]

    def streamWaitEvent(self, stream, event, flags):
        self._fail_if("streamWaitEvent")
        assert (stream, flags) == (0, 0)
        assert event in self.events

    def eventDestroy(self, event):
        self.events.remove(event)

    def ipcCloseMemHandle(self, address):
        owner = (address - self.base) // BLOCK_NBYTES
        assert address == self.address_of(owner)
        self.opened.remove(owner)
        self._flags(owner)[self.comm.rank] = 0
        self._fail_if("ipcCloseMemHandle")

    def memcpy(self, target, source, nbytes, kind):
        assert kind == self.memcpyDefault
        assert self.current
        is_write = self._is_open(target)
        assert is_write != self._is_open(source)
        self._fail_if("write" if is_write else "read")
        if is_write and self.flaw == "lost write":
            return
        if is_write and self.flaw == "other block":
            target = self.base + (target + BLOCK_NBYTES - self.base) % self.memory.size
        full_fence()
        ctypes.memmove(target, source, nbytes)
        full_fence()
        if not is_write and self.flaw == "other bytes":
            ctypes.memset(target, 7, nbytes)

    def deviceSynchronize(self):
        assert self.current

    # -- inside -----------------------------------------------------------------------------------

    def address_of(self, rank):
        return self.base + rank * BLOCK_NBYTES

    def _is_open(self, address):
        owner = (address - self.base) // BLOCK_NBYTES
        return owner in (self.comm.rank, *self.opened)

    def _flags(self, owner):
        start = owner * BLOCK_NBYTES + OPENED
        return self.memory[start : start + self.comm.size]

    def _fail_if(self, call):
        if self.flaw == call:
            raise CUDARuntimeError(f"cudaErrorInvalidValue: no {call}")


class _Current:
    """The device, while it is current."""

    def __init__(self, cupy, number):
        self.cupy, self.number = cupy, number

    def __enter__(self):
        self.cupy.current.append(self.number)

    def __exit__(self, *error):
        assert self.cupy.current.pop() == self.number


class _Memory:
    """The block of this rank, which holds what has been written to it before."""

    def __init__(self, cupy, nbytes):
        assert cupy.current
        assert nbytes <= OPENED
        self.cupy, self.ptr = cupy, cupy.address_of(cupy.comm.rank)

    def __del__(self):
        full_fence()
        assert not self.cupy._flags(self.cupy.comm.rank).any(), "released while others have it open"


class _Event:
    """The event of this rank."""

    def __init__(self, cupy, block, disable_timing, interprocess):
        assert (block, disable_timing, interprocess) == (False, True, True)
        self.cupy, self.ptr = cupy, ~cupy.comm.rank
        self._flag = cupy.memory[cupy.comm.rank * BLOCK_NBYTES + RECORDED :][:1]
        self._flag[:] = 0

    def record(self):
        assert self.cupy.current
        self._flag[:] = 1
        full_fence()
