"""Parameters on their way between nodes, in pages that nobody may touch before they are waited for.

A read or write without a wait ends the process with code ``FAULT_CODE`` and the parameter's name.
"""

import ctypes
import os
import signal

from shardopt.comm.node_memory.linux import PAGE_NBYTES
from shardopt.layout.span import Span

FAULT_CODE = 86

_PROT_NONE, _PROT_READ_WRITE = 0, 3
_SA_SIGINFO = 4
_ADDRESS_OFFSET = 16  # of si_addr in siginfo_t, on 64-bit Linux
_libc = ctypes.CDLL(None, use_errno=True)
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _SigAction(ctypes.Structure):
    _fields_ = (
        ("handler", _Handler),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class Guard:
    """Protects what an optimizer has on its way, from the end of a step to the wait for it."""

    def __init__(self, opt):
        self._parts = opt.core.parts
        self._protected = {}  # addresses and lengths by bucket
        prefetch = self._parts.prefetch
        self._wrap(prefetch, "send", after=self._protect)
        self._wrap(prefetch, "_undo_writes", before=self._release)
        self._wrap(prefetch, "finish_copies", before=self._release_all)
        self._action = _SigAction(_Handler(self._report), flags=_SA_SIGINFO)
        assert _libc.sigaction(signal.SIGSEGV, ctypes.byref(self._action), None) == 0

    def _wrap(self, owner, name, *, before=lambda *args: None, after=lambda *args: None):
        method = getattr(owner, name)

        def wrapped(*args):
            before(*args)
            result = method(*args)
            after(*args)
            return result

        setattr(owner, name, wrapped)

    def _protect(self, plans):
        partition = self._parts.registry.partition
        for plan in plans:
            bucket = partition.buckets[plan.bucket]
            array, view = self._parts.memory.params_of(bucket.region)
            start = partition.regions[bucket.region].start
            local = array.bytes_of(Span(bucket.start, bucket.stop).shift(-start))
            place = view.view.ctypes.data + local.start, local.numel
            assert place[0] % PAGE_NBYTES == place[1] % PAGE_NBYTES == 0
            self._protected[plan.bucket] = place
            assert _libc.mprotect(ctypes.c_void_p(place[0]), place[1], _PROT_NONE) == 0

    def _release(self, bucket):
        address, nbytes = self._protected.pop(bucket)
        assert _libc.mprotect(ctypes.c_void_p(address), nbytes, _PROT_READ_WRITE) == 0

    def _release_all(self, *args):
        if any(view.copies_shared for _, view in self._parts.memory.pieces[::2]):
            for bucket in list(self._protected):
                self._release(bucket)

    def _report(self, number, info, context):
        address = ctypes.c_uint64.from_address(info + _ADDRESS_OFFSET).value
        names = [
            binding.name
            for binding in self._parts.registry.bindings
            if 0 <= address - binding.own_data.ctypes.data < binding.own_data.nbytes
        ]
        os.write(2, f"parameter {names[0] if names else None!r} is on its way\n".encode())
        os._exit(FAULT_CODE)
