"""The compiled kernel on memory of tests' devices: it may access what it is given, and no more."""

import ctypes

import numpy as np

from shardopt.backends.base import address_of
from shardopt.backends.cuda.kernel import CudaKernel
from tests.support.cuda.devices import PtxDevice
from tests.support.cuda.memory import RED_ZONE_NBYTES, Memory


class AllAddresses(Memory):
    """All memory of the process, of which kernels may access what they are given.

    Args:
        nbytes: Where it ends.
    """

    def __init__(self, nbytes=1 << 47):
        self._owned = []
        room = (ctypes.c_uint8 * (nbytes - RED_ZONE_NBYTES)).from_address(RED_ZONE_NBYTES)
        super().__init__(np.ctypeslib.as_array(room))

    def array(self, values):
        raw = np.zeros(values.nbytes + RED_ZONE_NBYTES, np.uint8)
        start = -raw.ctypes.data % RED_ZONE_NBYTES
        copy = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        copy[...] = values
        self._owned.append(self.run(copy))
        self.add_runs(self._owned)
        return copy

    def allow(self, runs):
        """Allow accesses to some runs, and to what this has allocated, until the next call."""
        self.runs = sorted({*runs, *self._owned})

    def run(self, array):
        """Return where an array begins and ends, as ``runs`` has it."""
        start = address_of(array) - self.base
        return start, start + array.nbytes


class PtxKernel:
    """``CudaKernel``, compiled, with the PTX interpreted.

    Args:
        node_size: Ranks of the node.
    """

    def __init__(self, node_size):
        self._memory = AllAddresses()
        self._device = PtxDevice(memory=self._memory)
        self._kernel = CudaKernel(self._device, node_size)
        self.piece_numel = self._kernel.piece_numel
        self.prepare = self._kernel.prepare
        self.take_poisoned = self._kernel.take_poisoned
        self.close = self._kernel.close
        self.launches = self._device.launches

    def update(self, sources, targets, state, plan):
        self._allow([sources.part(plan.span), targets.part(plan.span)], state.values())
        self._kernel.update(sources, targets, state, plan)

    def reduce(self, sources, out, span, square_sums, factor=1.0):
        self._allow([sources.part(span)], [out, square_sums])
        self._kernel.reduce(sources, out, span, square_sums, factor)

    def _allow(self, rows, arrays):
        base, runs = self._memory.base, []
        for each in rows:
            nbytes = each.numel * each.dtype.itemsize
            runs += [(start - base, start - base + nbytes) for start in each.addresses.tolist()]
        runs += [self._memory.run(array) for array in arrays if array is not None]
        self._memory.allow([run for run in runs if run[0] < run[1]])
