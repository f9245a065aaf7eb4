"""The limits that node memory may meet, read before anything is allocated.

Memory that cannot be had is no error of an allocation: the kernel kills the process that touches
the page. So the limits are compared with what is needed while every rank can still raise. They are
files of ``/proc`` and ``/sys/fs/cgroup``; one that is missing or unreadable sets no limit here.
"""

from dataclasses import dataclass
from pathlib import Path

from shardopt.errors import SharedMemoryError

_ROOT = Path("/")
_NO_LIMIT = 1 << 60  # cgroup v1 has this or more where nothing limits it
_STRICT = "2"  # of vm.overcommit_memory: promise no more than there is
_FEWER = "or start fewer ranks on the node"


@dataclass(frozen=True, slots=True)
class Demand:
    """The memory that the ranks of a node are about to take, in bytes.

    Attributes:
        num_ranks: Ranks of the node.
        file_nbytes: The file that all of them share.
        view_nbytes: Each rank's private view of that file, which takes memory only where it writes.
        private_nbytes: Each rank's other memory.
    """

    num_ranks: int
    file_nbytes: int
    view_nbytes: int = 0
    private_nbytes: int = 0

    @property
    def memory_nbytes(self) -> int:
        """Memory that is certainly used."""
        return self.file_nbytes + self.num_ranks * self.private_nbytes

    @property
    def promised_nbytes(self) -> int:
        """Memory that the kernel must be able to promise if it accounts strictly."""
        return self.memory_nbytes + self.num_ranks * self.view_nbytes

    @property
    def address_nbytes(self) -> int:
        """Addresses that each rank needs."""
        return self.file_nbytes + self.view_nbytes + self.private_nbytes


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """The memory that may still be used.

    Attributes:
        free_nbytes: Its size.
        limit: The file that holds the limit, or None if that is the memory of the machine.
    """

    free_nbytes: int
    limit: str | None


def memory_shortage(demand: Demand, root: Path = _ROOT) -> SharedMemoryError | None:
    """Return an error if a limit of this rank or of its node does not allow what is needed.

    Every rank may call it: the limits of a process and of its cgroup are its own.

    Args:
        demand: The memory that the ranks of this node are about to take.
        root: The folder with ``proc`` and ``sys``.
    """
    return (
        _address_shortage(demand, root)
        or _promise_shortage(demand, root)
        or _memory_shortage(demand, root)
    )


def _address_shortage(demand: Demand, root: Path) -> SharedMemoryError | None:
    free_nbytes, needed_nbytes = read_address_room(root), demand.address_nbytes
    if free_nbytes is None or needed_nbytes <= free_nbytes:
        return None
    return SharedMemoryError(
        f"the address space of a rank must have room for {needed_nbytes:,} more bytes, to map the "
        f"node's memory; got {free_nbytes:,} bytes below its limit. Lift that before the job "
        "starts (ulimit -v unlimited)."
    )


def _promise_shortage(demand: Demand, root: Path) -> SharedMemoryError | None:
    free_nbytes, needed_nbytes = read_promise_room(root), demand.promised_nbytes
    if free_nbytes is None or needed_nbytes <= free_nbytes:
        return None
    return SharedMemoryError(
        f"the system must be able to promise {needed_nbytes:,} bytes, because with "
        "vm.overcommit_memory=2 it counts every rank's view of the weights in full; got "
        f"{free_nbytes:,} bytes below its CommitLimit. Set vm.overcommit_memory=0 (sysctl -w), "
        f"raise vm.overcommit_ratio, {_FEWER}."
    )


def _memory_shortage(demand: Demand, root: Path) -> SharedMemoryError | None:
    room, needed_nbytes = read_memory_room(root), demand.memory_nbytes
    if room is None or needed_nbytes <= room.free_nbytes:
        return None
    must = f"must leave {needed_nbytes:,} bytes for the parameters, gradients and optimizer state"
    if room.limit is None:
        return SharedMemoryError(
            f"the memory of the machine {must} of this node; got {room.free_nbytes:,} bytes. End "
            f"what else uses it, use more nodes, {_FEWER}."
        )
    return SharedMemoryError(
        f"the memory limit of this container or job {must} of this node; got {room.free_nbytes:,} "
        f"bytes below {room.limit}. Raise it (docker run --memory=..., resources.limits.memory of "
        f"a pod, sbatch --mem=...), {_FEWER}."
    )


def read_address_room(root: Path = _ROOT) -> int | None:
    """Return the bytes that this process may still map (``ulimit -v``), or None for any number."""
    limits, status = _read(root / "proc/self/limits"), _read(root / "proc/self/status")
    for line in limits.splitlines():
        if line.startswith("Max address space"):
            soft = line.split()[3]
            mapped_nbytes = _kib(status, "VmSize") or 0
            return max(0, int(soft) - mapped_nbytes) if soft.isdecimal() else None
    return None


def read_promise_room(root: Path = _ROOT) -> int | None:
    """Return the bytes that the kernel may still promise, or None if it does not keep count."""
    if _read(root / "proc/sys/vm/overcommit_memory").strip() != _STRICT:
        return None
    meminfo = _read(root / "proc/meminfo")
    limit, promised = _kib(meminfo, "CommitLimit"), _kib(meminfo, "Committed_AS")
    if limit is None or promised is None:
        return None
    return max(0, limit - promised)


def read_memory_room(root: Path = _ROOT) -> MemoryRoom | None:
    """Return the memory that may still be used on this node, by its tightest limit.

    File cache counts as free, and so does swap as far as it may be used: a job that swaps is slow,
    but nobody kills it. None if it is not known.
    """
    meminfo = _read(root / "proc/meminfo")
    available = _kib(meminfo, "MemAvailable")
    if available is None:
        return None
    swap = _kib(meminfo, "SwapFree") or 0
    rooms = [MemoryRoom(available + swap, None)]
    for folder, names in _cgroups(root):
        room = _cgroup_room(folder, names, swap)
        if room is not None:
            shown = "/" / (folder / names.limit).relative_to(root)
            rooms.append(MemoryRoom(room, str(shown)))
    return min(rooms, key=lambda room: room.free_nbytes)


@dataclass(frozen=True, slots=True)
class _Names:
    """The files of a memory cgroup, in one of its two versions."""

    limit: str
    usage: str
    swap_limit: str
    swap_usage: str
    swap_includes_memory: bool


_VERSION_1 = _Names(
    *("memory.limit_in_bytes", "memory.usage_in_bytes"),
    *("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
    swap_includes_memory=True,
)
_VERSION_2 = _Names(
    *("memory.max", "memory.current", "memory.swap.max", "memory.swap.current"),
    swap_includes_memory=False,
)


def _cgroups(root: Path) -> list[tuple[Path, _Names]]:
    """Return the memory cgroups of this process, from its own up to the topmost that it sees."""
    memberships = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    found = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, *_, options = after.split() or [""]
        if kind == "cgroup2":
            names, controller = _VERSION_2, ""
        elif kind == "cgroup" and "memory" in options.split(","):
            names, controller = _VERSION_1, "memory"
        else:
            continue
        mounted, place = before.split()[3:5]
        for _, controllers, path in memberships:
            if controller in controllers.split(","):
                top = root / place.lstrip("/")
                # A container may mount its own cgroup only, and see the path as the host has it.
                below = Path(path).relative_to(mounted) if _is_below(path, mounted) else Path()
                folder = top / below
                chain = [folder, *folder.parents]
                found += [(one, names) for one in chain[: len(below.parts) + 1]]
    return found


def _is_below(path: str, mounted: str) -> bool:
    return Path(path).is_relative_to(mounted) and ".." not in Path(path).parts


def _cgroup_room(folder: Path, names: _Names, system_swap: int) -> int | None:
    """Return the bytes that the processes of a cgroup may still use; None for any number."""
    limit, usage = _number(folder / names.limit), _number(folder / names.usage)
    if limit is None or usage is None:
        return None
    stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    prefix = "total_" if names.swap_includes_memory else ""  # those below it, in version 1
    cache = sum(int(stat.get(f"{prefix}{part}_file", 0)) for part in ("inactive", "active"))
    room = max(0, limit - usage + cache)
    swap_limit, swap_usage = _number(folder / names.swap_limit), _number(folder / names.swap_usage)
    if swap_limit is None or swap_usage is None:
        return room + system_swap
    swap_room = max(0, swap_limit - swap_usage)
    if names.swap_includes_memory:
        return min(room + system_swap, swap_room + cache)
    return room + min(system_swap, swap_room)


def _number(path: Path) -> int | None:
    """Return the number in a file of a cgroup; None if there is none or it stands for no limit."""
    text = _read(path).strip()
    return int(text) if text.isdecimal() and int(text) < _NO_LIMIT else None


def _kib(text: str, name: str) -> int | None:
    """Return what a file such as ``/proc/meminfo`` says in KiB, in bytes."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
