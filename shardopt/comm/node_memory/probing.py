"""Why written pages cannot be found here by userfaultfd or the pagemap, in words for doctor."""

import errno
import os
from pathlib import Path

from shardopt.comm.node_memory.linux import (
    PAGE_NBYTES,
    Mapping,
    PageMap,
    WriteProtection,
    WriteScan,
    drop_pages,
    make_memfd,
    map_file,
)

_FIRST_ASYNC = "Linux 6.7"  # both async write protection and PAGEMAP_SCAN
_NUM_PAGES = 2


def why_no_userfaultfd() -> str | None:
    """Return None if writes can be tracked by userfaultfd, else a sentence with the reason."""
    try:
        protection = WriteProtection()
        scan = WriteScan()
        view = _private_pages()
        protection.register(view.address, view.nbytes)
        works = not scan.take(view.address, view.nbytes)
        for _ in range(2):  # the second time after a drop
            view.array[PAGE_NBYTES] = 1
            runs = [run.tolist() for run in scan.take(view.address, view.nbytes)]
            works &= runs == [[[view.address + PAGE_NBYTES, view.address + view.nbytes]]]
            drop_pages(view.address, view.nbytes)
    except OSError as error:
        return _explain(error)
    return None if works else f"Linux {os.uname().release} reports other pages than were written."


def why_no_pagemap() -> str | None:
    """Return None if the pagemap shows the pages that were written, else a sentence why not."""
    try:
        pagemap, view = PageMap(), _private_pages()
        view.array.sum()
        works = pagemap.private_pages(view.address, view.nbytes).tolist() == [False, False]
        view.array[PAGE_NBYTES] = 1
        works &= pagemap.private_pages(view.address, view.nbytes).tolist() == [False, True]
    except OSError as error:
        return f"The pagemap cannot be read: {error.strerror}."
    return None if works else "The pagemap does not show which pages have been written."


def _private_pages() -> Mapping:
    """Map pages of a new file privately."""
    fd = make_memfd("shardopt-probe")
    try:
        os.ftruncate(fd, _NUM_PAGES * PAGE_NBYTES)
        return map_file(fd, 0, _NUM_PAGES * PAGE_NBYTES, private=True)
    finally:
        os.close(fd)


def _explain(error: OSError) -> str:
    """Return a sentence for what failed on the way to tracked writes."""
    if error.filename:
        return f"{error.filename}, which userfaultfd takes too, cannot be read: {error.strerror}."
    call, release = error.strerror or "", os.uname().release
    if call.startswith("ioctl(UFFDIO_API)") or error.errno == errno.ENOTTY:
        return (
            f"Linux {release} is too old: it takes {_FIRST_ASYNC} to track writes by userfaultfd."
        )
    if not call.startswith("userfaultfd:"):
        return f"Writes cannot be tracked by userfaultfd: {call}."
    if error.errno == errno.ENOSYS and os.uname().machine not in ("x86_64", "aarch64"):
        return f"{call}."
    if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS) and _has_filter():
        return (
            "The container's seccomp list refuses userfaultfd; allow that system call "
            "(docker run --security-opt seccomp=PROFILE)."
        )
    if error.errno == errno.EPERM:
        return "The system refuses userfaultfd; set vm.unprivileged_userfaultfd to 1."
    return f"This kernel has no userfaultfd: {call}."


def _has_filter() -> bool:
    """Whether a seccomp filter watches this process."""
    return "\nSeccomp:\t2" in Path("/proc/self/status").read_text(encoding="ascii")
