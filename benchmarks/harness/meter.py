"""The cost of something to a rank: seconds of its cores, and memory at its highest."""

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_RESET_PEAK = "5"  # of proc(5)
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def cpu_s(run: Callable[[], object]) -> float:
    """Call ``run`` and return the seconds that all threads of this process computed meanwhile."""
    before_s = time.process_time()
    run()
    return time.process_time() - before_s


def growth_nbytes(run: Callable[[], object]) -> int:
    """Call ``run`` and return by how much resident memory grew at its highest."""
    gc.collect()
    _LIBC.malloc_trim(0)  # freed memory must not be reused without being counted
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = _status_nbytes("VmRSS")
    run()
    return max(0, _status_nbytes("VmHWM") - before)


def return_freed_memory() -> None:
    """From now on, return freed memory to the system at once."""
    _LIBC.mallopt(_M_MMAP_THRESHOLD, 1 << 17)


def proportional_set_nbytes() -> int:
    """Return this process's resident memory, shared pages divided by those who share them."""
    return _proportional_nbytes("Pss")


def array_set_nbytes() -> int:
    """Return the same without the pages of files, which processes of other jobs may share."""
    return _proportional_nbytes("Pss_Anon") + _proportional_nbytes("Pss_Shmem")


def _proportional_nbytes(name: str) -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(
        f"/proc/self/smaps_rollup must have a line '{name}:'; got none. Use Linux >= 5.4."
    )


def _status_nbytes(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status must have a line '{name}:'; got none. Use Linux.")
    return int(found[1]) * 1024
