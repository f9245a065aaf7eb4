"""Keeps a log of what a piece of code does to the file system, for power_loss.py to judge."""

import itertools
import os
import stat
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SYNCS = ("fsync", "fdatasync")
UNMODELLED = frozenset(
    [
        "copy_file_range",
        "fdopen",
        "link",
        "mkfifo",
        "mknod",
        "removedirs",
        "renames",
        "sendfile",
        "splice",
        "symlink",
        "truncate",
        "writev",
    ]
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One call that succeeded; the stamps are those of the machine's monotonic clock.

    ``file`` is the same in all processes, and stays with a file when it is renamed. ``at`` is where
    the data begin, the new size of a truncate, or the least size that an allocate leaves.
    """

    kind: str
    start: int
    end: int
    path: str  # or the text of a mark
    file: tuple[int, int] | None = None  # device and inode
    target: str = ""  # of a rename
    at: int = 0
    data: bytes = field(default=b"", repr=False)


class Recorder:
    """Stands in for the module ``os``, and logs what is done to the file system through it.

    Threads may share it. A call that raises is not logged. Calls that would change the file system
    in ways that the model does not know are refused.

    Args:
        real: What makes the calls; a test may hand in one that fails or interferes.
    """

    def __init__(self, real: Any = os) -> None:
        self.log: list[Operation] = []  # append alone changes it, which is atomic
        self._real = real
        self._position = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name in UNMODELLED:
            raise NotImplementedError(f"the power-loss model does not know os.{name}")
        return getattr(self._real, name)

    def mark(self, text: str) -> None:
        """Log that the code has come this far."""
        with self._note("mark", text):
            pass

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        """A create is logged as such even if the file was there: the history knows better."""
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise NotImplementedError("the power-loss model does not know O_TMPFILE")
        with self._note("create" if flags & os.O_CREAT else "open", "") as told:
            fd = self._real.open(path, flags, mode)
            told.update(_identify(fd))
        if flags & os.O_TRUNC:
            # The file has been open for a moment only: the stamps of the create serve.
            self.log.append(Operation("truncate", **(told | {"end": time.monotonic_ns()})))
        return fd

    def close(self, fd: int) -> None:
        with self._note("close", **_identify(fd)):
            self._real.close(fd)

    def write(self, fd: int, data: Any) -> int:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return self._real.write(fd, data)
        whole = memoryview(data).tobytes()
        with self._position, self._note("write", **_identify(fd)) as told:
            count = self._real.write(fd, data)
            # Asked for afterwards, as O_APPEND moves to the end first.
            told.update(at=os.lseek(fd, 0, os.SEEK_CUR) - count, data=whole[:count])
        return count

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        whole = memoryview(data).tobytes()
        with self._note("write", **_identify(fd), at=offset) as told:
            count = self._real.pwrite(fd, data, offset)
            told["data"] = whole[:count]
        return count

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        whole = b"".join(memoryview(buffer).tobytes() for buffer in buffers)
        with self._note("write", **_identify(fd), at=offset) as told:
            count = self._real.pwritev(fd, buffers, offset, flags)
            told["data"] = whole[:count]
        return count

    def ftruncate(self, fd: int, length: int) -> None:
        with self._note("truncate", **_identify(fd), at=length):
            self._real.ftruncate(fd, length)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        with self._note("allocate", **_identify(fd), at=offset + length):
            self._real.posix_fallocate(fd, offset, length)

    def fsync(self, fd: int) -> None:
        with self._note("fsync", **_identify(fd)):
            self._real.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        with self._note("fdatasync", **_identify(fd)):
            self._real.fdatasync(fd)

    def mkdir(self, path: Any, mode: int = 0o777) -> None:
        with self._note("mkdir", _locate(path)) as told:
            self._real.mkdir(path, mode)
            status = os.stat(path)
            told["file"] = (status.st_dev, status.st_ino)

    def makedirs(self, name: Any, mode: int = 0o777, exist_ok: bool = False) -> None:
        path = Path(name)
        for parent in reversed(path.parents):
            if not parent.exists():
                with suppress(FileExistsError):  # another rank was faster
                    self.mkdir(parent)
        try:
            self.mkdir(path, mode)
        except FileExistsError:
            if not exist_ok or not path.is_dir():
                raise

    def rename(self, src: Any, dst: Any) -> None:
        with self._note("rename", _locate(src), target=_locate(dst)):
            self._real.rename(src, dst)

    def replace(self, src: Any, dst: Any) -> None:
        with self._note("rename", _locate(src), target=_locate(dst)):
            self._real.replace(src, dst)

    def unlink(self, path: Any) -> None:
        with self._note("unlink", _locate(path)):
            self._real.unlink(path)

    def remove(self, path: Any) -> None:
        with self._note("unlink", _locate(path)):
            self._real.remove(path)

    def rmdir(self, path: Any) -> None:
        with self._note("rmdir", _locate(path)):
            self._real.rmdir(path)

    def rmtree(self, path: Any, ignore_errors: bool = False) -> None:
        """As shutil's: the recorder may stand in for that module, too."""
        forgiving = suppress(OSError) if ignore_errors else nullcontext()
        with forgiving:
            for name in os.listdir(path):
                inner = os.path.join(path, name)
                with forgiving:
                    if os.path.isdir(inner) and not os.path.islink(inner):
                        self.rmtree(inner, ignore_errors)
                    else:
                        self.unlink(inner)
            self.rmdir(path)

    @contextmanager
    def _note(self, kind: str, path: str, **told: Any) -> Iterator[dict[str, Any]]:
        """Log an operation unless it raises; the block may add to what is told of it."""
        told |= {"start": time.monotonic_ns(), "path": path}
        yield told
        self.log.append(Operation(kind, **({"end": time.monotonic_ns()} | told)))


def _identify(fd: int) -> dict[str, Any]:
    """What an operation tells of an open file: the system knows its path, after renames too."""
    status = os.fstat(fd)
    path = os.readlink(f"/proc/self/fd/{fd}")
    return {"path": path, "file": (status.st_dev, status.st_ino)}


def _locate(path: Any) -> str:
    """The path of a name, all symbolic links before the name itself resolved."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name)


def merge(logs: Iterable[Iterable[Operation]]) -> list[Operation]:
    """One log, in the order in which the operations began, of those of several processes.

    Who saw the effect of an operation began his own later, so causes come before effects.
    """
    return sorted(itertools.chain.from_iterable(logs), key=lambda op: op.start)


def without(log: Iterable[Operation], predicate: Callable[[Operation], Any]) -> list[Operation]:
    """The log as it would be without the fsyncs and fdatasyncs for which the predicate holds."""
    return [op for op in log if not (op.kind in SYNCS and predicate(op))]


def fsyncs(
    log: Iterable[Operation], root: Any, role: Callable[[str], str] = str
) -> Iterator[tuple[str, list[Operation]]]:
    """Each role of what was fsynced at or below the root, and all fsyncs of that role.

    Args:
        log: What happened.
        root: The root; its own path is ".".
        role: Makes a role of a path below the root, as it was at the time of the call.
    """
    found: defaultdict[str, list[Operation]] = defaultdict(list)
    for op in log:
        if op.kind in SYNCS:
            path = os.path.relpath(op.path, os.path.realpath(root))
            if path.split(os.sep)[0] != os.pardir:
                found[role(path)].append(op)
    yield from found.items()
