"""The limits of memory, as the files of ``/proc`` and ``/sys/fs/cgroup`` tell them."""

import resource
import subprocess
import sys

import pytest

from shardopt.comm.node_memory.limits import (
    Demand,
    MemoryRoom,
    memory_shortage,
    read_address_room,
    read_memory_room,
    read_promise_room,
)
from shardopt.errors import SharedMemoryError

GIB = 1 << 30
MEMINFO = """MemTotal:       16777216 kB
MemAvailable:    8388608 kB
SwapFree:        1048576 kB
CommitLimit:     4194304 kB
Committed_AS:    1048576 kB
"""
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max resident set          unlimited            unlimited            bytes
Max address space         {}           unlimited            bytes
"""
V1_MOUNT = "36 31 0:32 {} {} rw,relatime - cgroup cgroup rw,memory\n"
V2_MOUNT = "41 31 0:38 {} {} rw,relatime - cgroup2 cgroup2 rw\n"


@pytest.fixture
def write(tmp_path):
    """Return a function that writes files of a machine of 8 GiB, which sets no other limit."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
        return tmp_path

    write("proc/meminfo", MEMINFO)
    write("proc/self/limits", LIMITS.format("unlimited"))
    write("proc/self/status", "Name:\tpython\nVmSize:\t 1048576 kB\n")
    write("proc/sys/vm/overcommit_memory", "0\n")
    return write


def write_v2(write, folder, limit, used, cache=0, **swap):
    write(f"{folder}/memory.max", limit)
    write(f"{folder}/memory.current", used)
    write(f"{folder}/memory.stat", f"anon 7\ninactive_file {cache}\nactive_file 0\n")
    for name, value in swap.items():
        write(f"{folder}/memory.swap.{name}", value)


def test_a_machine_without_limits(write, tmp_path):
    assert read_memory_room(tmp_path) == MemoryRoom(9 * GIB, None)  # with the swap space
    assert read_address_room(tmp_path) is None
    assert read_promise_room(tmp_path) is None
    assert memory_shortage(Demand(4, 5 * GIB, 100 * GIB, GIB), tmp_path) is None
    told = str(memory_shortage(Demand(4, 5 * GIB + 1, 0, GIB), tmp_path))
    assert "the memory of the machine must leave 9,663,676,417 bytes" in told
    assert "got 9,663,676,416 bytes." in told


def test_nothing_is_known(tmp_path):
    assert read_memory_room(tmp_path) is None
    assert memory_shortage(Demand(4, 1 << 60), tmp_path) is None


def test_an_address_space_that_is_limited(write, tmp_path):
    write("proc/self/limits", LIMITS.format(4 * GIB))
    assert read_address_room(tmp_path) == 3 * GIB
    assert memory_shortage(Demand(2, GIB, GIB, GIB), tmp_path) is None
    error = memory_shortage(Demand(2, GIB, GIB, GIB + 1), tmp_path)
    assert isinstance(error, SharedMemoryError)
    assert "must have room for 3,221,225,473 more bytes" in str(error)
    assert "ulimit -v unlimited" in str(error)


def test_promises_that_are_counted(write, tmp_path):
    """Each rank's private view of the file counts, though no page of it is written."""
    write("proc/sys/vm/overcommit_memory", "2\n")
    assert read_promise_room(tmp_path) == 3 * GIB
    assert memory_shortage(Demand(2, GIB, GIB), tmp_path) is None
    told = str(memory_shortage(Demand(2, GIB, GIB + 1), tmp_path))
    assert "vm.overcommit_memory=2" in told
    assert "promise 3,221,225,474 bytes" in told


@pytest.mark.parametrize("by", ["its own", "the one above"])
def test_the_tightest_cgroup_of_version_2(write, tmp_path, by):
    write("proc/self/cgroup", "0::/job/step\n")
    write("proc/self/mountinfo", V2_MOUNT.format("/", "/sys/fs/cgroup"))
    tight, loose = "sys/fs/cgroup/job", "sys/fs/cgroup/job/step"
    if by == "its own":
        tight, loose = loose, tight
    write_v2(write, loose, "max", 5 * GIB)
    write_v2(write, tight, 4 * GIB, 3 * GIB, cache=GIB // 2, max=0, current=0)
    assert read_memory_room(tmp_path) == MemoryRoom(3 * GIB // 2, f"/{tight}/memory.max")
    told = str(memory_shortage(Demand(1, 2 * GIB), tmp_path))
    assert f"got 1,610,612,736 bytes below /{tight}/memory.max. Raise it (docker run" in told


@pytest.mark.parametrize(("swap", "more"), [({}, GIB), ({"max": GIB // 4, "current": 0}, GIB // 4)])
def test_swap_that_a_cgroup_may_use(write, tmp_path, swap, more):
    write("proc/self/cgroup", "0::/\n")
    write("proc/self/mountinfo", V2_MOUNT.format("/", "/sys/fs/cgroup"))
    write_v2(write, "sys/fs/cgroup", 2 * GIB, GIB, **swap)
    assert read_memory_room(tmp_path).free_nbytes == GIB + more


@pytest.mark.parametrize("path", ["/docker/abc", "/elsewhere", "/../.."])
def test_a_container_that_sees_its_own_cgroup_only(write, tmp_path, path):
    """Docker mounts the container's cgroup, while its path may be that of the host."""
    write("proc/self/cgroup", f"5:cpu,cpuacct:/x\n4:memory:{path}\n0::/\n")
    write("proc/self/mountinfo", V1_MOUNT.format("/docker/abc", "/sys/fs/cgroup/memory"))
    folder = "sys/fs/cgroup/memory"
    write(f"{folder}/memory.limit_in_bytes", 2 * GIB)
    write(f"{folder}/memory.usage_in_bytes", GIB)
    write(f"{folder}/memory.stat", f"total_inactive_file {GIB // 2}\ntotal_active_file 0\n")
    write(f"{folder}/memory.memsw.limit_in_bytes", 2 * GIB)  # no swap beyond memory
    write(f"{folder}/memory.memsw.usage_in_bytes", GIB)
    limit = f"/{folder}/memory.limit_in_bytes"
    assert read_memory_room(tmp_path) == MemoryRoom(3 * GIB // 2, limit)
    write(f"{folder}/memory.limit_in_bytes", 9223372036854771712)  # version 1's "none"
    assert read_memory_room(tmp_path) == MemoryRoom(9 * GIB, None)


def test_the_address_space_of_this_process():
    source = (
        "from shardopt.comm.node_memory.limits import *\n"
        "print(read_address_room(), memory_shortage(Demand(1, 2 << 30)))"
    )
    limited = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )
    room, told = limited.stdout.split(maxsplit=1)
    assert 0 < int(room) < 2 << 30, limited.stderr
    assert told.startswith("the address space of a rank must have room for 2,147,483,648 more")
