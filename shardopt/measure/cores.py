"""The cores that this process may use; run as a script, it prints their number.

It needs the standard library only: launchers run it before anything is installed.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count_cores() -> int:
    """Count the cores this process is bound to, or those its container's quota amounts to."""
    return max(1, min(len(bound_to()), read_quota(QUOTA)))


def bound_to() -> frozenset[int]:
    """The cores this process is bound to; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def read_quota(path: Path) -> int:
    """Read a cgroup's quota, in whole cores; it bounds nothing where there is none."""
    unbounded = 1 << 30
    try:
        quota_us, period_us = path.read_text().split()
    except (OSError, ValueError):
        return unbounded
    return unbounded if quota_us == "max" else math.ceil(int(quota_us) / int(period_us))


if __name__ == "__main__":
    print(count_cores())
