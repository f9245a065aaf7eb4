"""The cores that this process may use; as a script, it prints their number.

It needs the standard library only, as launchers run it before anything is installed.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardopt.comm.topology import Topology

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count_cores() -> int:
    """Count the cores this process is bound to, or as many as its container's quota allows."""
    return max(1, min(len(bound_to()), read_quota(QUOTA)))


def bound_to() -> frozenset[int]:
    """Return the cores this process is bound to: all of them if the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def read_quota(path: Path) -> int:
    """Read a cgroup's quota, in whole cores: a very large number if there is none."""
    unbounded = 1 << 30
    try:
        quota_us, period_us = path.read_text().split()
    except (OSError, ValueError):
        return unbounded
    return unbounded if quota_us == "max" else math.ceil(int(quota_us) / int(period_us))


def cores_per_rank(topology: Topology) -> int:
    """Return this rank's share of the cores it may run on. Collective: every rank."""
    mine = topology.hosts[topology.rank], bound_to()
    sharing = topology.comm.allgather(mine).count(mine)
    return max(1, count_cores() // sharing)


if __name__ == "__main__":
    print(count_cores())
