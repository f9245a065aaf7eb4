"""What something costs a rank: seconds, seconds of its cores, memory at its highest."""

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_RESET_PEAK = "5"  # of proc(5)


def cpu_s(run: Callable[[], object]) -> float:
    """Seconds that all threads of this process together compute meanwhile."""
    before_s = time.process_time()
    run()
    return time.process_time() - before_s


def growth_nbytes(run: Callable[[], object]) -> int:
    """Resident memory at its highest meanwhile, beyond what it is at the beginning."""
    gc.collect()
    _LIBC.malloc_trim(0)  # what was freed must not be had for nothing
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = _status_nbytes("VmRSS")
    run()
    return max(0, _status_nbytes("VmHWM") - before)


def _status_nbytes(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status must have a line '{name}:'; got none. Use Linux.")
    return int(found[1]) * 1024
