"""The Linux calls that node memory needs and Python lacks, each with its return code checked.

Written pages of a private mapping are found by userfaultfd's asynchronous write protection (Linux
6.7): the kernel itself lifts the protection of a page at the first write, and a scan of the page
table returns the pages without protection and protects them again, in one call. Nobody ever reads
from the userfaultfd. Older kernels, and containers that refuse userfaultfd, still show in
``/proc/self/pagemap`` which pages a process has copied for itself.
"""

import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PAGE_NBYTES = mmap.PAGESIZE
ALIGN = 2 << 20  # the size of a huge page

_MAX_TRIES = 1000  # of a call that the kernel asks to repeat

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000  # on x86-64, AArch64, RISC-V alike
_MADV_DONTNEED = 4
_MADV_DONTNEED_LOCKED = 24  # Linux 5.18
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}  # the number of the system call
_UFFD_USER_MODE_ONLY = 1  # Linux 5.11; needs no privilege
_UFFD_API = 0xAA
_UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
_UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
_UFFD_FEATURE_WP_ASYNC = 1 << 15  # Linux 6.7
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_REGISTER_MODE_WP = 2
_UFFDIO_WRITEPROTECT = 0xC018AA06
_UFFDIO_WRITEPROTECT_MODE_WP = 1

_PAGEMAP_SCAN = 0xC0606610
_PM_SCAN_WP_MATCHING = 1
_PM_SCAN_CHECK_WPASYNC = 2
_PAGE_IS_WRITTEN = 1 << 1
_MAX_REGIONS = 512  # a scan goes on where these are full

_PAGEMAP = "/proc/self/pagemap"
_PAGEMAP_ENTRIES = 1 << 16  # read at a time; they stay in the cache
_PAGEMAP_KIND_SHIFT = 61  # leaves the bits: present, swapped, file
_PAGEMAP_PRESENT, _PAGEMAP_SWAPPED = 4, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_libc.syscall.argtypes = [ctypes.c_long, ctypes.c_long]
_libc.syscall.restype = ctypes.c_long


class _UffdioApi(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("api", "features", "ioctls")]


class _UffdioRegister(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("start", "nbytes", "mode", "ioctls")]


class _UffdioWriteprotect(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("start", "nbytes", "mode")]


class _PmScanArg(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages",
            "category_inverted", "category_mask", "category_anyof_mask", "return_mask",
        )
    ]  # fmt: skip


def _checked(
    call: str, attempt: Callable[[], int], retry_on: Collection[int] = (errno.EINTR,)
) -> int:
    """Return what ``attempt`` returns, repeated while it fails with one of ``retry_on``.

    Raises:
        OSError: It returned -1.
    """
    code = 0
    for _ in range(_MAX_TRIES):
        result = attempt()
        if result != -1:
            return result
        code = ctypes.get_errno()
        if code not in retry_on:
            break
    raise OSError(code, f"{call}: {os.strerror(code)}")


@dataclass(frozen=True)
class Mapping:
    """Mapped memory; it is unmapped when nothing refers to the array or a view of it any more."""

    address: int
    nbytes: int
    array: NDArray[np.uint8]


def make_memfd(name: str) -> int:
    """Return the descriptor of a new, empty file that lives in memory and has no path."""
    return os.memfd_create(name, os.MFD_CLOEXEC)


def map_file(fd: int, offset: int, nbytes: int, *, private: bool) -> Mapping:
    """Map whole pages of a file to an address that is a multiple of ALIGN, to read and write.

    Args:
        fd: The file.
        offset: Where the range begins, a multiple of PAGE_NBYTES.
        nbytes: Its length, a positive multiple of PAGE_NBYTES.
        private: Pages that are written become this process's own; else all see what is written.
    """
    _assert_pages(offset, nbytes)
    reserved_nbytes = nbytes + ALIGN
    reserved = _mmap(0, reserved_nbytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = -(-reserved // ALIGN) * ALIGN
    # Few pages of a private mapping are ever written: do not reserve swap space for all of them.
    sharing = mmap.MAP_PRIVATE | _MAP_NORESERVE if private else mmap.MAP_SHARED
    try:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        _mmap(address, nbytes, access, sharing | _MAP_FIXED, fd, offset)
    except OSError:
        _munmap(reserved, reserved_nbytes)
        raise
    _munmap(reserved, address - reserved)
    _munmap(address + nbytes, reserved + ALIGN - address)
    buffer = (ctypes.c_uint8 * nbytes).from_address(address)  # what views of the array hold on to
    weakref.finalize(buffer, _munmap, address, nbytes).atexit = False
    return Mapping(address, nbytes, np.ctypeslib.as_array(buffer))


def map_again(mapping: Mapping, fd: int, offset: int) -> None:
    """Map a file privately in the place of a mapping of the same range that was shared."""
    access, sharing = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_NORESERVE
    _mmap(mapping.address, mapping.nbytes, access, sharing | _MAP_FIXED, fd, offset)


def _mmap(address: int, nbytes: int, access: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    flags |= _MAP_NORESERVE if fd == -1 else 0

    def attempt() -> int:
        result = _libc.mmap(address, nbytes, access, flags, fd, offset)
        return -1 if result == ctypes.c_void_p(-1).value else int(result)

    return _checked(f"mmap of {nbytes:,} bytes", attempt, (errno.EAGAIN,))


def _munmap(address: int, nbytes: int) -> None:
    if nbytes:
        _checked("munmap", lambda: int(_libc.munmap(address, nbytes)), ())


def drop_pages(address: int, nbytes: int) -> bool:
    """Drop this process's own copies of pages, so that the file shows again.

    Returns:
        Whether they were dropped. Locked pages are not, before Linux 5.18.
    """
    _assert_pages(address, nbytes)
    for advice in (_MADV_DONTNEED, _MADV_DONTNEED_LOCKED):
        try:
            # Through the C library: UCX and libfabric hook its madvise to forget registrations.
            _checked(
                "madvise(MADV_DONTNEED)",
                lambda advice=advice: int(_libc.madvise(address, nbytes, advice)),  # type: ignore[misc]
                (errno.EAGAIN, errno.EINTR),
            )
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return True
    return False


def punch_hole(fd: int, offset: int, nbytes: int) -> None:
    """Release the memory of a range of a file, which reads as zeros from then on."""
    _assert_pages(offset, nbytes)
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    _checked(
        "fallocate(FALLOC_FL_PUNCH_HOLE)", lambda: int(_libc.fallocate(fd, mode, offset, nbytes))
    )


def has_data(fd: int, offset: int, nbytes: int) -> bool:
    """Return whether some page of a range of a file is in memory or swapped out."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) < offset + nbytes
    except OSError as error:
        if error.errno != errno.ENXIO:  # nothing but a hole up to the end of the file
            raise
        return False


class WriteProtection:
    """A userfaultfd in asynchronous write-protect mode; closing it lifts all protection.

    A forked child must not use it: the descriptor it inherits acts on its parent's memory.

    Raises:
        OSError: It cannot be had here.
    """

    def __init__(self) -> None:
        self._fd = _open_userfaultfd()
        weakref.finalize(self, os.close, self._fd).atexit = False
        features = (
            _UFFD_FEATURE_WP_ASYNC | _UFFD_FEATURE_WP_UNPOPULATED | _UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        )
        self._ioctl("UFFDIO_API", _UFFDIO_API, _UffdioApi(_UFFD_API, features))

    def register(self, address: int, nbytes: int) -> None:
        """Begin to track a range of a private mapping, and protect it."""
        _assert_pages(address, nbytes)
        request = _UffdioRegister(address, nbytes, _UFFDIO_REGISTER_MODE_WP)
        self._ioctl("UFFDIO_REGISTER", _UFFDIO_REGISTER, request)
        self.protect(address, nbytes)

    def protect(self, address: int, nbytes: int) -> None:
        """Protect a registered range again, whatever has been written to it."""
        _assert_pages(address, nbytes)
        request = _UffdioWriteprotect(address, nbytes, _UFFDIO_WRITEPROTECT_MODE_WP)
        self._ioctl("UFFDIO_WRITEPROTECT", _UFFDIO_WRITEPROTECT, request)

    def _ioctl(self, call: str, number: int, request: ctypes.Structure) -> None:
        _checked(
            f"ioctl({call})",
            lambda: int(_libc.ioctl(self._fd, number, ctypes.addressof(request))),
            (errno.EAGAIN, errno.EINTR),
        )


def _open_userfaultfd() -> int:
    machine = os.uname().machine
    if machine not in _SYS_USERFAULTFD:
        raise OSError(errno.ENOSYS, f"userfaultfd: its number is not known for {machine}")

    def open_with(flags: int) -> int:
        number = _SYS_USERFAULTFD[machine]
        return _checked("userfaultfd", lambda: int(_libc.syscall(number, flags)))

    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return open_with(flags | _UFFD_USER_MODE_ONLY)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise
        return open_with(flags)


class WriteScan:
    """Finds the pages written since they were protected, and protects them again.

    The kernel also reports pages that have no entry in the page table, not even a protected one:
    those of a hole that was punched after they had been protected.

    Raises:
        OSError: There is no pagemap.
    """

    def __init__(self) -> None:
        self._fd = _open_pagemap(self)
        self._lock = threading.Lock()  # the structures below are used again by each call
        regions = ((ctypes.c_int64 * 3) * _MAX_REGIONS)()  # start, end, categories
        self._regions = np.ctypeslib.as_array(regions)
        self._request = _PmScanArg(
            size=ctypes.sizeof(_PmScanArg),
            flags=_PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC,
            vec=ctypes.addressof(regions),
            vec_len=_MAX_REGIONS,
            category_mask=_PAGE_IS_WRITTEN,
            return_mask=_PAGE_IS_WRITTEN,
        )
        self._request_address = ctypes.addressof(self._request)

    def take(self, address: int, nbytes: int) -> list[NDArray[np.int64]]:
        """Return the written pages of a registered range and protect them, at one instant each.

        Returns:
            Arrays [n, 2] of addresses where runs of pages begin and end, in order. Runs that
            touch each other may be separate.
        """
        _assert_pages(address, nbytes)
        runs, end, request = [], address + nbytes, self._request
        with self._lock:
            while address < end:
                request.start, request.end = address, end
                num_regions = self._scan()
                if num_regions == 0 and request.walk_end == end:  # the usual case, and fast
                    break
                if num_regions < 0:
                    num_regions = _checked("ioctl(PAGEMAP_SCAN)", self._scan)
                if num_regions:
                    runs.append(self._regions[:num_regions, :2].copy())
                walk_end = int(request.walk_end)
                if walk_end <= address:
                    raise OSError(errno.EIO, f"ioctl(PAGEMAP_SCAN): no progress at {address:#x}")
                address = walk_end
        return runs

    def _scan(self) -> int:
        return int(_libc.ioctl(self._fd, _PAGEMAP_SCAN, self._request_address))


class PageMap:
    """The pagemap of this process, which shows the pages that it has copied for itself.

    Raises:
        OSError: There is no pagemap.
    """

    def __init__(self) -> None:
        self._fd = _open_pagemap(self)
        self._lock = threading.Lock()  # the buffer is used again by each call
        self._entries = np.empty(_PAGEMAP_ENTRIES, np.uint64)

    def private_pages(self, address: int, nbytes: int) -> NDArray[np.bool_]:
        """Return for each page of a private mapping whether it is this process's own copy."""
        _assert_pages(address, nbytes)
        first, num_pages = address // PAGE_NBYTES, nbytes // PAGE_NBYTES
        private = np.empty(num_pages, np.bool_)
        with self._lock:
            done = 0
            while done < num_pages:
                entries = self._entries[: num_pages - done]
                num_read = os.preadv(self._fd, [entries.data], (first + done) * 8) // 8
                if num_read == 0:
                    raise OSError(errno.EIO, f"{_PAGEMAP} ended at page {first + done}")
                kind = entries[:num_read]
                kind >>= np.uint64(_PAGEMAP_KIND_SHIFT)
                part = private[done : done + num_read]
                np.equal(kind, _PAGEMAP_PRESENT, out=part)  # in memory, and not the file's
                part |= (kind & np.uint64(_PAGEMAP_SWAPPED)).astype(np.bool_)
                done += num_read
        return private


def _open_pagemap(owner: object) -> int:
    """Open this process's pagemap until ``owner`` is collected."""
    fd = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    weakref.finalize(owner, os.close, fd).atexit = False
    return fd


def _assert_pages(start: int, nbytes: int) -> None:
    assert start % PAGE_NBYTES == 0
    assert nbytes % PAGE_NBYTES == 0
    assert nbytes > 0
