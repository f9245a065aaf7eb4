"""The Linux layer of node memory: mappings live as long as views of them, and every call tells."""

import errno
import gc
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shardopt.comm.node_memory import linux, probing
from shardopt.comm.node_memory.linux import (
    ALIGN,
    PAGE_NBYTES,
    PageMap,
    WriteProtection,
    WriteScan,
    drop_pages,
    make_memfd,
    map_file,
    punch_hole,
)

NUM_PAGES = 8
NBYTES = NUM_PAGES * PAGE_NBYTES


@pytest.fixture
def fd() -> Iterator[int]:
    fd = make_memfd("test")
    os.ftruncate(fd, 2 * NBYTES)
    yield fd
    os.close(fd)


def is_mapped(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return any(start <= address < stop for start, stop in ranges)


def fail(code: int) -> int:
    """Fail as the C library does."""
    linux.ctypes.set_errno(code)
    return -1


def addresses(runs: list[np.ndarray]) -> list[list[int]]:
    return [run for part in runs for run in part.tolist()]


@pytest.mark.parametrize("private", [False, True])
def test_a_mapping_is_aligned_and_shows_its_range_of_the_file(fd, private):
    os.pwrite(fd, b"\x07", NBYTES)
    mapping = map_file(fd, NBYTES, NBYTES, private=private)
    assert mapping.address % ALIGN == 0
    assert mapping.array.ctypes.data == mapping.address
    assert mapping.array.size == mapping.nbytes == NBYTES
    assert mapping.array[0] == 7
    mapping.array[1] = 8
    assert os.pread(fd, 1, NBYTES + 1) == (b"\0" if private else b"\x08")


def test_only_the_mapping_itself_is_left_of_the_reservation(fd):
    before = Path("/proc/self/statm").read_text().split()[0]
    mapping = map_file(fd, 0, NBYTES, private=False)
    assert int(Path("/proc/self/statm").read_text().split()[0]) - int(before) < 2 * NUM_PAGES
    assert is_mapped(mapping.address + NBYTES - 1)


def test_memory_is_unmapped_after_its_last_view_and_never_earlier(fd):
    mapping = map_file(fd, 0, NBYTES, private=False)
    address = mapping.address
    view = mapping.array[PAGE_NBYTES:].view(np.float32).reshape(7, -1)[1:]
    del mapping
    gc.collect()
    assert is_mapped(address)
    view[:] = 1
    del view
    gc.collect()
    assert not is_mapped(address)


def test_a_failed_mapping_leaves_nothing_and_names_the_call():
    before = Path("/proc/self/maps").read_text().count("\n")
    with pytest.raises(OSError, match=f"mmap of {NBYTES:,} bytes: Bad file") as caught:
        map_file(1 << 20, 0, NBYTES, private=False)
    assert caught.value.errno == errno.EBADF
    assert Path("/proc/self/maps").read_text().count("\n") <= before + 1


def test_a_memfd_closes_on_exec(fd):
    assert not os.get_inheritable(fd)


def test_dropped_pages_show_the_file_again(fd):
    shared = map_file(fd, 0, NBYTES, private=False)
    view = map_file(fd, 0, NBYTES, private=True)
    view.array[:] = 1
    shared.array[:] = 2
    assert (view.array == 1).all()
    assert drop_pages(view.address + PAGE_NBYTES, PAGE_NBYTES)
    pages = view.array.reshape(NUM_PAGES, -1)
    assert (pages[1] == 2).all()
    assert (np.delete(pages, 1, axis=0) == 1).all()


def test_locked_pages_are_dropped_or_it_says_so(fd, monkeypatch):
    view = map_file(fd, 0, NBYTES, private=True)
    assert linux._libc.mlock(linux.ctypes.c_void_p(view.address), NBYTES) == 0
    view.array[:] = 1
    monkeypatch.setattr(linux, "_MADV_DONTNEED_LOCKED", 9999)  # as before Linux 5.18
    assert not drop_pages(view.address, NBYTES)
    assert (view.array == 1).all()
    monkeypatch.undo()
    if drop_pages(view.address, NBYTES):
        assert (view.array == 0).all()


def test_dropping_what_is_not_mapped_is_an_error(fd):
    address = map_file(fd, 0, NBYTES, private=True).address
    gc.collect()
    assert not is_mapped(address)
    with pytest.raises(OSError, match=r"madvise\(MADV_DONTNEED\): Cannot allocate memory"):
        drop_pages(address, NBYTES)


def test_a_hole_reads_as_zeros_and_has_no_memory(fd):
    shared = map_file(fd, 0, 2 * NBYTES, private=False)
    shared.array[:] = 1
    blocks = os.fstat(fd).st_blocks
    punch_hole(fd, NBYTES, NBYTES)
    assert (shared.array[:NBYTES] == 1).all()
    assert os.fstat(fd).st_blocks == blocks // 2
    assert os.fstat(fd).st_size == 2 * NBYTES
    assert (shared.array[NBYTES:] == 0).all()
    with pytest.raises(OSError, match=r"fallocate\(FALLOC_FL_PUNCH_HOLE\): Bad file descriptor"):
        punch_hole(1 << 20, 0, NBYTES)


def test_calls_are_repeated_as_often_as_the_kernel_asks_for_it():
    results = iter([errno.EAGAIN, errno.EINTR, 0])

    def attempt() -> int:
        return fail(code) if (code := next(results)) else 5

    assert linux._checked("call", attempt, (errno.EAGAIN, errno.EINTR)) == 5
    with pytest.raises(BlockingIOError, match="call: Resource temporarily unavailable"):
        linux._checked("call", lambda: fail(errno.EAGAIN), (errno.EAGAIN,))


needs_userfaultfd = pytest.mark.skipif(
    probing.why_no_userfaultfd() is not None, reason=str(probing.why_no_userfaultfd())
)


@needs_userfaultfd
def test_a_scan_returns_written_pages_once_and_goes_on_when_it_is_full(fd):
    num_pages = 2 * linux._MAX_REGIONS * 3 + 5
    os.ftruncate(fd, num_pages * PAGE_NBYTES)
    view = map_file(fd, 0, num_pages * PAGE_NBYTES, private=True)
    protection, scan = WriteProtection(), WriteScan()
    protection.register(view.address, view.nbytes)
    assert addresses(scan.take(view.address, view.nbytes)) == []
    view.array[:: 2 * PAGE_NBYTES] = 1
    runs = scan.take(view.address, view.nbytes)
    starts = view.address + np.arange(0, num_pages, 2) * PAGE_NBYTES
    assert len(runs) == 4
    assert addresses(runs) == [[start, start + PAGE_NBYTES] for start in starts]
    assert addresses(scan.take(view.address, view.nbytes)) == []


@needs_userfaultfd
def test_pages_stay_protected_when_they_are_dropped(fd):
    view = map_file(fd, 0, NBYTES, private=True)
    protection, scan = WriteProtection(), WriteScan()
    protection.register(view.address, view.nbytes)
    for _ in range(3):
        view.array[PAGE_NBYTES] = 1
        scan.take(view.address, view.nbytes)
        drop_pages(view.address, view.nbytes)
        assert view.array[PAGE_NBYTES] == 0
        assert addresses(scan.take(view.address, view.nbytes)) == []
        view.array[PAGE_NBYTES] = 1
        first = view.address + PAGE_NBYTES
        assert addresses(scan.take(view.address, view.nbytes)) == [[first, first + PAGE_NBYTES]]


@needs_userfaultfd
def test_a_scan_of_what_is_not_registered_is_an_error(fd):
    view = map_file(fd, 0, NBYTES, private=True)
    with pytest.raises(OSError, match=r"ioctl\(PAGEMAP_SCAN\): Operation not permitted"):
        WriteScan().take(view.address, view.nbytes)


def test_the_pagemap_tells_a_copy_from_a_page_of_the_file(fd, monkeypatch):
    monkeypatch.setattr(linux, "_PAGEMAP_ENTRIES", 3)  # several reads
    shared = map_file(fd, 0, NBYTES, private=False)
    view = map_file(fd, 0, NBYTES, private=True)
    shared.array[: 6 * PAGE_NBYTES] = 1
    assert view.array[: 4 * PAGE_NBYTES].sum() == 4 * PAGE_NBYTES
    view.array[PAGE_NBYTES] = view.array[7 * PAGE_NBYTES] = 2
    private = PageMap().private_pages(view.address, view.nbytes)
    assert np.flatnonzero(private).tolist() == [1, 7]


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    monkeypatch.setattr(linux._libc, name, lambda *_: fail(code))


@pytest.mark.parametrize(
    ("name", "code", "has_filter", "reason"),
    [
        ("syscall", errno.EPERM, True, "seccomp list refuses"),
        ("syscall", errno.ENOSYS, True, "seccomp list refuses"),
        ("syscall", errno.EPERM, False, "vm.unprivileged_userfaultfd"),
        ("syscall", errno.ENOSYS, False, "This kernel has no userfaultfd"),
        ("ioctl", errno.EINVAL, False, "takes Linux 6.7"),
    ],
)
def test_doctor_is_told_why_there_is_no_userfaultfd(monkeypatch, name, code, has_filter, reason):
    if name == "ioctl" and probing.why_no_userfaultfd():
        pytest.skip("there is no userfaultfd")
    refuse(monkeypatch, name, code)
    monkeypatch.setattr(probing, "_has_filter", lambda: has_filter)
    sentence = probing.why_no_userfaultfd()
    assert reason in sentence
    assert sentence.endswith(".")


def test_other_machines_have_no_number_for_userfaultfd(monkeypatch):
    monkeypatch.setattr(linux, "_SYS_USERFAULTFD", {})
    assert f"not known for {platform.machine()}" in probing.why_no_userfaultfd()


@needs_userfaultfd
def test_doctor_is_told_why_there_is_no_pagemap(monkeypatch):
    assert probing.why_no_pagemap() is None
    monkeypatch.setattr(linux, "_PAGEMAP", "/proc/self/no-such-file")
    assert "cannot be read: No such file" in probing.why_no_pagemap()
    assert "no-such-file, which userfaultfd takes too" in (probing.why_no_userfaultfd() or "")
