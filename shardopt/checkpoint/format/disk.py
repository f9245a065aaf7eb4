"""Everything that changes the file system; no other module of checkpoints does.

[Note: what survives a loss of power]
A file's bytes are safe after fsync of the file, its name after fsync of its folder. So: data files,
each with fsync; the manifest under another name, fsync, rename; fsync of the folder, which by then
holds all names; rename of the folder to its final name, which is the commit; fsync of the folders
above. A checkpoint is acknowledged after that. Until the commit its folder has a name that no
reader looks at, so that there is no moment at which half of a checkpoint can be taken for one.
"""

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import local
from typing import Protocol

import xxhash

from shardopt.checkpoint.format.image import (
    HEADER_ALIGNMENT,
    PIECE_NBYTES,
    Bytes,
    aligned_empty,
    run_all,
)
from shardopt.checkpoint.format.manifest import CHUNK_NBYTES, MANIFEST_NAME

UNFINISHED_PREFIX = ".unfinished-"
REMOVED_PREFIX = ".removed-"

_NUM_WRITERS = 4  # requests in flight; they mostly wait
_YOUNG_S = 60.0


class Image(Protocol):
    """What can be written: see ``FileImage``."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        ...

    def piece(self, start: int, stop: int, buffer: Bytes) -> Bytes:
        """Give bytes [start, stop), in ``buffer`` or elsewhere on a page."""
        ...


def make_folder(path: Path) -> None:
    """Make a folder and those above it; another job may be making them, too."""
    if not path.is_dir():
        make_folder(path.parent)
        with suppress(FileExistsError):
            os.mkdir(path)


def make_unfinished(path: Path) -> None:
    """Make a folder that need not survive before it is committed."""
    make_folder(path.parent)
    os.mkdir(path)


def sync_folder(path: Path) -> None:
    """Make durable which names a folder has."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # it has none, as with autofs
            raise
    finally:
        os.close(fd)


def write_file(path: Path, image: Image) -> str:
    """Write a new file durably, past the page cache where the file system lets us.

    Digests are of what is in memory: what happens to the bytes on their way is found by whoever
    reads them.

    Returns:
        The digests of its chunks, one after another, in hexadecimal digits.

    Raises:
        OSError: It cannot be written.
    """
    fd = _open_new(path)
    # Direct writes are of whole pages; what is behind the last of them goes through the cache.
    tail = image.nbytes // HEADER_ALIGNMENT * HEADER_ALIGNMENT
    buffers = local()

    def write_piece(start: int) -> str:
        if not hasattr(buffers, "own"):
            buffers.own = aligned_empty(PIECE_NBYTES)
        piece = image.piece(start, min(start + PIECE_NBYTES, image.nbytes), buffers.own)
        digests = [
            xxhash.xxh3_128_hexdigest(piece[chunk : chunk + CHUNK_NBYTES].data)
            for chunk in range(0, len(piece), CHUNK_NBYTES)
        ]
        _write_all(fd, piece[: tail - start].data, start)
        return "".join(digests)

    try:
        digests = run_all(write_piece, range(0, image.nbytes, PIECE_NBYTES), _NUM_WRITERS)
        _write_through_cache(fd)
        rest = image.piece(tail, image.nbytes, aligned_empty(HEADER_ALIGNMENT))
        _write_all(fd, rest.data, tail)
        os.fsync(fd)
    finally:
        os.close(fd)
    return "".join(digests)


def write_manifest(folder: Path, text: bytes) -> None:
    """Write the manifest, which makes a folder of files a checkpoint, durably."""
    part = folder / f"{MANIFEST_NAME}.part"
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(fd, memoryview(text), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(part, folder / MANIFEST_NAME)
    sync_folder(folder)


def commit(folder: Path, final: Path) -> None:
    """Give a finished folder its name.

    Raises:
        FileExistsError: There is something of that name.
        OSError: That cannot be made durable; the folder has its old name then.
    """
    try:
        os.rename(folder, final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, "exists already", str(final)) from None
        raise
    try:
        for parent in final.parents:  # any of them may have been made for this
            with suppress(PermissionError):
                sync_folder(parent)
    except OSError:
        with suppress(OSError):
            os.rename(final, folder)
            sync_folder(final.parent)
        raise


def remove(folder: Path) -> None:
    """Remove a checkpoint: first its name, so that nobody takes what is left of it for one."""
    trash = folder.with_name(f"{REMOVED_PREFIX}{secrets.token_hex(4)}-{folder.name}")
    with suppress(FileNotFoundError):  # another job may be removing it, or what is left of it
        os.rename(folder, trash)
        sync_folder(folder.parent)
        shutil.rmtree(trash)


def discard(folder: Path) -> None:
    """Remove what was never committed, as far as that can be done."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Let other jobs see that a folder is being written; the mark goes when this process does."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some file systems have no locks: then its age protects it
            fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def leftovers(directory: Path) -> list[Path]:
    """Find what dead jobs have left unfinished in a directory of checkpoints."""
    return [
        folder
        for folder in directory.iterdir()
        if folder.name.startswith((UNFINISHED_PREFIX, REMOVED_PREFIX)) and _is_abandoned(folder)
    ]


def remove_leftovers(directory: Path) -> None:
    """Remove what dead jobs have left unfinished in a directory of checkpoints."""
    for folder in leftovers(directory):
        discard(folder)


def _is_abandoned(folder: Path) -> bool:
    """Whether no living process of this machine writes there, nor another one just made it."""
    try:
        if time.time() - folder.stat().st_mtime < _YOUNG_S:
            return False
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)


def _open_new(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)  # it may have been made all the same


def _write_through_cache(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    written = 0
    while written < len(data):
        try:
            written += os.pwrite(fd, data[written:], offset + written)
        except OSError as error:
            if error.errno != errno.EINVAL or not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise
            _write_through_cache(fd)  # a file system that promises direct writes, and refuses them
