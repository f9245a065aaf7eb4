"""Reading a checkpoint: its bytes go straight to where they belong, and each is verified."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import local
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from shardopt.backends.codes import shaped, values_of
from shardopt.checkpoint.format.fields import damaged
from shardopt.checkpoint.format.image import aligned_empty, run_all
from shardopt.checkpoint.format.manifest import (
    CHUNK_NBYTES,
    MANIFEST_NAME,
    MAX_MANIFEST_NBYTES,
    PARAM_KEY,
    Manifest,
)
from shardopt.checkpoint.format.messages import must
from shardopt.checkpoint.format.parsing import from_text
from shardopt.checkpoint.format.requests import (
    Bytes,
    ReadTask,
    Wanted,
    plan_tasks,
    wanted_slices,
)
from shardopt.checkpoint.format.values import decode
from shardopt.errors import CheckpointError, DamagedCheckpointError
from shardopt.layout.span import Span

Revive: TypeAlias = Callable[[NDArray[Any], str], Any]

_PIECE_NBYTES = 512 << 10
"""Read and then hashed at once: source and target together fit into a cache of 1 MiB. Smaller ones
have the threads of a rank wait for each other between them."""


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: There is no checkpoint, or its manifest is damaged.
    """
    return from_text(read_manifest_text(path))


def read_manifest_text(path: Path) -> bytes:
    """Read the text of a checkpoint's manifest; see ``from_text``."""
    try:
        with open(path / MANIFEST_NAME, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):  # a device may have no end
                raise damaged(str(path / MANIFEST_NAME), "be a file", "something else")
            if status.st_size > MAX_MANIFEST_NBYTES:
                rule = f"have at most {MAX_MANIFEST_NBYTES} bytes"
                raise damaged(MANIFEST_NAME, rule, status.st_size)
            return file.read(status.st_size + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.exists():
            got, remedy = (
                f"{str(path)!r}, which does not exist",
                "Look for it with: shardopt ckpt ls",
            )
            raise CheckpointError(must("path", "be a checkpoint", got, remedy)) from error
        raise damaged(str(path), f"hold a {MANIFEST_NAME}", "none") from error
    except OSError as error:
        raise damaged(str(path / MANIFEST_NAME), "be readable", error.strerror or "") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # otherwise a pipe would wait for a writer


class Reader:
    """The files of one checkpoint; a context manager.

    Attributes:
        path: The folder of the checkpoint.
        manifest: The manifest of the checkpoint.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._fds: dict[int, int] = {}

    def require_files(self) -> None:
        """Check that there are all files in their sizes, and no others.

        Raises:
            DamagedCheckpointError: They are not; the message names the file.
        """
        for problem in self.file_problems():
            raise problem

    def file_problems(self) -> Iterator[DamagedCheckpointError]:
        """Find files that are missing, of a wrong size, or surplus, without reading them."""
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
        """Read bytes into their targets, and verify them.

        Args:
            wanted: The bytes, in any order; targets do not overlap.
            num_threads: Number of threads that read and hash.
            advance: Called, on any thread, with the number of bytes read since the last call.
            damage: Called likewise with file, chunk and error of each damaged chunk. Without it the
                first such error is raised.

        Raises:
            DamagedCheckpointError: A chunk is not what was written; the message names it and its
                file. The content of targets is undefined then.
        """
        tasks = list(plan_tasks(wanted, self.manifest.files))
        for task in tasks:
            self._open(task.file)
        buffers = local()

        def run(task: ReadTask) -> None:
            if not hasattr(buffers, "own"):
                buffers.own = aligned_empty(CHUNK_NBYTES)
            self._run(task, buffers.own, damage)
            if advance is not None:
                advance(task.numel)

        run_all(run, tasks, num_threads)

    def whole_files(self) -> list[Wanted]:
        """Return a request to verify everything."""
        return [Wanted(0, file.nbytes, i) for i, file in enumerate(self.manifest.files)]

    def array(self, file: int, index: int) -> NDArray[Any]:
        """Read an array of ``extra`` into a new array of its shape."""
        entry = self.manifest.files[file].arrays[index]
        try:
            array = np.empty(entry.shape, entry.dtype)
        except (MemoryError, ValueError) as error:
            raise damaged("an array of extra", "fit the memory", entry.shape) from error
        target = array.reshape(-1).view(np.uint8)
        self.read([Wanted(entry.place.start, entry.place.stop, file, target)])
        return array

    def decode(self, value: Any, revive: Revive = lambda array, _: array) -> Any:
        """Decode a value of the manifest, reading the arrays that it refers to.

        Each may be referred to once: otherwise a small file could fill any memory.

        Args:
            value: The value, encoded.
            revive: Makes of an array and its form what was saved.
        """
        read = set()

        def array(file: int, index: int) -> Any:
            if (file, index) in read:
                raise damaged("an array of extra", "be referred to once", [file, index])
            read.add((file, index))
            return revive(self.array(file, index), self.manifest.files[file].arrays[index].form)

        return decode(value, array)

    def extra(self, revive: Revive = lambda array, _: array) -> dict[str, Any] | None:
        """Read ``extra`` as it was saved; its ``per_rank`` has an entry for each rank.

        Args:
            revive: Makes of an array and its form what was saved.
        """
        extra: dict[str, Any] | None = self.decode(self.manifest.extra["replicated"], revive)
        if not isinstance(extra, dict | None):
            raise damaged("extra", "be a dict or None", type(extra).__name__)
        per_rank = self.manifest.extra["per_rank"]
        if per_rank is None:
            return extra
        return {**(extra or {}), "per_rank": self.decode(per_rank, revive)}

    def tensor(self, param: int, key: str = PARAM_KEY) -> NDArray[Any]:
        """Read a whole parameter, or an array of its state.

        Returns:
            A new array in the parameter's shape; the values of codes.
        """
        entry = self.manifest.params[param]
        spec, whole = entry.spec_of(key), Span(0, entry.numel)
        flat = np.empty(spec.nbytes(entry.numel), np.uint8).view(spec.dtype)
        self.read(wanted_slices(self.manifest.slices[param][key], whole, spec, flat))
        return values_of(shaped(flat, spec), spec, entry.numel).reshape(entry.shape)

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
        task: ReadTask,
        buffer: Bytes,
        damage: Callable[[int, int, DamagedCheckpointError], object] | None,
    ) -> None:
        """Read and verify chunk by chunk."""
        for chunk in task.chunks(CHUNK_NBYTES):
            if task.target is None:
                content = buffer[: chunk.numel]
            else:
                content = task.target[chunk.index_in(task)]
            try:
                self._read_chunk(task.file, chunk, content)
            except DamagedCheckpointError as error:
                if damage is None:
                    raise
                damage(task.file, chunk.start // CHUNK_NBYTES, error)
            for part in task.parts:
                if part.target is not None:
                    common = part.intersect(chunk)
                    np.copyto(part.target[common.index_in(part)], content[common.index_in(chunk)])

    def _read_chunk(self, file: int, chunk: Span, content: Bytes) -> None:
        entry, number = self.manifest.files[file], chunk.start // CHUNK_NBYTES
        digest = _read_and_hash(self._fds[file], content, chunk.start, entry.name)
        if digest != entry.digest(number):
            raise damaged(
                f"chunk {number} of file {entry.name}",
                f"have the digest {entry.digest(number)}",
                f"another (bytes {chunk.start} to {chunk.stop})",
            )


def _read_and_hash(fd: int, target: Bytes, offset: int, name: str) -> str:
    """Fill ``target`` piece by piece, and return the digest of all of it."""
    hasher, position = xxhash.xxh3_128(), 0
    while position < len(target):
        piece = target[position : position + _PIECE_NBYTES].data
        try:
            count = os.preadv(fd, [piece], offset + position)
        except OSError as error:
            raise damaged(f"file {name}", "be readable", error.strerror or "an error") from error
        if count == 0:
            raise damaged(f"file {name}", f"reach byte {offset + len(target)}", offset + position)
        hasher.update(piece[:count])
        position += count
    return hasher.hexdigest()
