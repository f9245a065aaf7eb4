"""Reading: a checkpoint's bytes, straight to where they belong, each verified; no MPI.

[Note: verified while it lands]
Digests are of whole chunks, requests of any runs of bytes. Chunks that one request covers are read
where they are wanted and hashed there, while they are in the cache. A chunk at the edge of
a request, or one that several share, is read into a buffer, hashed, and copied from there.
"""

import os
import stat
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import local
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from shardopt.checkpoint.format.fields import damaged
from shardopt.checkpoint.format.image import Bytes, aligned_empty, run_all
from shardopt.checkpoint.format.manifest import (
    CHUNK_NBYTES,
    MANIFEST_NAME,
    MAX_MANIFEST_NBYTES,
    PARAM_KEY,
    FileEntry,
    Manifest,
    Slice,
    from_text,
)
from shardopt.checkpoint.format.values import decode
from shardopt.errors import CheckpointError, DamagedCheckpointError

_TASK_CHUNKS = 8


class Wanted(NamedTuple):
    """A run of a file's bytes, and where it is to be put; nowhere, if it is only to be verified."""

    file: int
    offset: int
    nbytes: int
    target: Bytes | None


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    return from_text(read_manifest_text(path))


def read_manifest_text(path: Path) -> bytes:
    """Read the bytes of a checkpoint's manifest; see ``from_text``."""
    try:
        with open(path / MANIFEST_NAME, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):  # of a device there is no end
                raise damaged(str(path / MANIFEST_NAME), "be a file", "something else")
            if status.st_size > MAX_MANIFEST_NBYTES:
                rule = f"have at most {MAX_MANIFEST_NBYTES} bytes"
                raise damaged(MANIFEST_NAME, rule, status.st_size)
            return file.read(status.st_size + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.exists():
            raise CheckpointError(
                f"path must be a checkpoint; got {str(path)!r}, which does not exist. Look for it "
                "with: shardopt ckpt ls."
            ) from error
        raise damaged(str(path), f"hold a {MANIFEST_NAME}", "none") from error
    except OSError as error:
        raise damaged(str(path / MANIFEST_NAME), "be readable", error.strerror or "") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a pipe would wait for a writer


class Reader:
    """The files of one checkpoint; a context manager.

    Attributes:
        path: Its folder.
        manifest: What it says of itself.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._fds: dict[int, int] = {}

    def require_files(self) -> None:
        """See that all files are there in their sizes, and no others.

        Raises:
            DamagedCheckpointError: Names the file.
        """
        for problem in self.file_problems():
            raise problem

    def file_problems(self) -> Iterator[DamagedCheckpointError]:
        """Find files that are missing, of another size, or surplus, without reading them."""
        expected = {MANIFEST_NAME, *(file.name for file in self.manifest.files)}
        try:
            names = sorted(os.listdir(self.path))
        except OSError as error:
            yield damaged(str(self.path), "be a readable folder", error.strerror or "an error")
            return
        for name in names:
            if name not in expected and not name.startswith("."):
                yield damaged(str(self.path), "hold only what was saved", f"{name}, too")
        for file in self.manifest.files:
            try:
                nbytes = (self.path / file.name).stat().st_size
            except OSError:
                yield damaged(f"file {file.name}", "be there", "none")
                continue
            if nbytes != file.nbytes:
                yield damaged(f"file {file.name}", f"have {file.nbytes} bytes", nbytes)

    def read(
        self,
        wanted: Iterable[Wanted],
        num_threads: int = 1,
        advance: Callable[[int], object] | None = None,
        damage: Callable[[int, int, DamagedCheckpointError], object] | None = None,
    ) -> None:
        """Read and verify runs of bytes, each into its target.

        Args:
            wanted: In any order; targets do not overlap.
            num_threads: Threads that read and hash.
            advance: Called, by any thread, with the number of bytes read since.
            damage: Called likewise with file, chunk and error of each damaged chunk. Without it the
                first one is raised.

        Raises:
            DamagedCheckpointError: A chunk is not what was written; names the file and the chunk.
                Targets are undefined then.
        """
        tasks = list(_plan_tasks(wanted, self.manifest.files))
        for task in tasks:
            self._open(task.file)
        buffers = local()

        def run(task: "_Task") -> None:
            if not hasattr(buffers, "own"):
                buffers.own = aligned_empty(CHUNK_NBYTES)
            self._run(task, buffers.own, damage)
            if advance is not None:
                advance(task.nbytes)

        run_all(run, tasks, num_threads)

    def whole_files(self) -> list[Wanted]:
        """Everything, to be verified."""
        return [Wanted(i, 0, file.nbytes, None) for i, file in enumerate(self.manifest.files)]

    def array(self, file: int, index: int) -> NDArray[Any]:
        """Read an array of ``extra``: a new one in its shape."""
        entry = self.manifest.files[file].arrays[index]
        try:
            array = np.empty(entry.shape, entry.dtype)
        except (MemoryError, ValueError) as error:
            raise damaged("an array of extra", "fit the memory", entry.shape) from error
        target = array.reshape(-1).view(np.uint8)
        self.read([Wanted(file, entry.offset, target.size, target)])
        return array

    def decode(self, value: Any) -> Any:
        """Decode a value of the manifest, reading the arrays that it refers to.

        Each is referred to once: else a small file could fill any memory.
        """
        read = set()

        def array(file: int, index: int) -> NDArray[Any]:
            if (file, index) in read:
                raise damaged("an array of extra", "be referred to once", [file, index])
            read.add((file, index))
            return self.array(file, index)

        return decode(value, array)

    def extra(self) -> dict[str, Any] | None:
        """Read what was saved as ``extra``; ``per_rank`` in it has an entry for each rank."""
        extra: dict[str, Any] | None = self.decode(self.manifest.extra["replicated"])
        if not isinstance(extra, dict | None):
            raise damaged("extra", "be a dict or None", type(extra).__name__)
        per_rank = self.manifest.extra["per_rank"]
        if per_rank is None:
            return extra
        return {**(extra or {}), "per_rank": self.decode(per_rank)}

    def tensor(self, param: int, key: str = PARAM_KEY) -> NDArray[Any]:
        """Read a whole parameter, or an array of its state.

        Returns:
            A new array in the parameter's shape.
        """
        entry = self.manifest.params[param]
        array = np.empty(entry.shape, entry.dtype_of(key))
        flat = array.reshape(-1)
        self.read(wanted_slices(self.manifest.slices[param][key], 0, entry.numel, flat))
        return array

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, file: int) -> None:
        if file not in self._fds:
            path = self.path / self.manifest.files[file].name
            try:
                self._fds[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise damaged(f"file {path.name}", "be readable", error.strerror or "") from error

    def _run(
        self,
        task: "_Task",
        buffer: Bytes,
        damage: Callable[[int, int, DamagedCheckpointError], object] | None,
    ) -> None:
        """Read and verify chunk by chunk, so that each is hashed while it is in the cache."""
        entry = self.manifest.files[task.file]
        first = task.first * CHUNK_NBYTES
        for chunk in range(task.first, task.last):
            start = chunk * CHUNK_NBYTES
            stop = min(start + CHUNK_NBYTES, entry.nbytes)
            if task.target is None:
                content = buffer[: stop - start]
            else:
                content = task.target[start - first : stop - first]
            try:
                self._read_chunk(task.file, chunk, content)
            except DamagedCheckpointError as error:
                if damage is None:
                    raise
                damage(task.file, chunk, error)
            for run in task.parts:
                if run.target is not None:
                    low, high = max(run.offset, start), min(run.offset + run.nbytes, stop)
                    part = content[low - start : high - start]
                    np.copyto(run.target[low - run.offset : high - run.offset], part)

    def _read_chunk(self, file: int, chunk: int, content: Bytes) -> None:
        entry, start = self.manifest.files[file], chunk * CHUNK_NBYTES
        _read_full(self._fds[file], content, start, entry.name)
        if xxhash.xxh3_128_hexdigest(content.data) != entry.digest(chunk):
            raise damaged(
                f"chunk {chunk} of file {entry.name}",
                f"have the digest {entry.digest(chunk)}",
                f"another (bytes {start} to {start + len(content)})",
            )


def wanted_slices(
    slices: Sequence[Slice], start: int, stop: int, target: NDArray[Any]
) -> Iterator[Wanted]:
    """Find the elements [start, stop) of a tensor in the files.

    Args:
        slices: Of the tensor, in order.
        start: First element.
        stop: One past the last.
        target: [stop - start], contiguous.
    """
    size = target.itemsize
    raw = target.view(np.uint8)
    index = bisect_left(slices, start, key=lambda part: part.stop - 1) if start < stop else 0
    position = start
    while position < stop:
        part = slices[index]
        end = min(stop, part.stop)
        offset = part.offset + (position - part.start) * size
        piece = raw[(position - start) * size : (end - start) * size]
        yield Wanted(part.file, offset, piece.size, piece)
        position, index = end, index + 1


@dataclass(slots=True)
class _Task:
    """Chunks [first, last) of a file: into ``target`` as they are, or by a buffer to ``parts``."""

    file: int
    first: int
    last: int
    nbytes: int
    target: Bytes | None
    parts: list[Wanted]


def _plan_tasks(wanted: Iterable[Wanted], files: Sequence[FileEntry]) -> Iterator[_Task]:
    """Arrange requests by chunks; see [Note: verified while it lands]."""
    by_file: dict[int, list[Wanted]] = {}
    for run in wanted:
        if run.nbytes:
            by_file.setdefault(run.file, []).append(run)
    for file, runs in by_file.items():
        runs.sort(key=lambda run: run.offset)
        yield from _plan_file(file, files[file].nbytes, runs)


def _plan_file(file: int, file_nbytes: int, runs: Sequence[Wanted]) -> Iterator[_Task]:
    shared: _Task | None = None  # the chunk that the next run may have a part of
    for run in runs:
        stop = run.offset + run.nbytes
        first, last = run.offset // CHUNK_NBYTES, -(-stop // CHUNK_NBYTES)
        whole_first = -(-run.offset // CHUNK_NBYTES)
        whole_last = last if stop == file_nbytes else stop // CHUNK_NBYTES
        for chunk in (c for c in (first, last - 1) if not whole_first <= c < whole_last):
            if shared is not None and shared.first == chunk:
                if shared.parts[-1] is not run:
                    shared.parts.append(run)
                continue
            if shared is not None:
                yield shared
            nbytes = min(CHUNK_NBYTES, file_nbytes - chunk * CHUNK_NBYTES)
            shared = _Task(file, chunk, chunk + 1, nbytes, None, [run])
        for start in range(whole_first, whole_last, _TASK_CHUNKS):
            end = min(start + _TASK_CHUNKS, whole_last)
            low, high = start * CHUNK_NBYTES, min(end * CHUNK_NBYTES, file_nbytes)
            target = None
            if run.target is not None:
                target = run.target[low - run.offset : high - run.offset]
            yield _Task(file, start, end, high - low, target, [])
    if shared is not None:
        yield shared


def _read_full(fd: int, target: Bytes, offset: int, name: str) -> None:
    position = 0
    while position < len(target):
        try:
            count = os.preadv(fd, [target[position:].data], offset + position)
        except OSError as error:
            raise damaged(f"file {name}", "be readable", error.strerror or "an error") from error
        if count == 0:
            raise damaged(f"file {name}", f"reach byte {offset + len(target)}", offset + position)
        position += count
