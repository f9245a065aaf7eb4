"""Everything that changes the file system; no other module of checkpoints does.

[Note: what survives a loss of power]
A file's bytes are safe after fsync of the file, its name after fsync of its folder. So a save
writes the data files, each with fsync; writes the manifest under another name, with fsync, and
renames it; calls fsync for the folder, which by then holds all names; renames the folder to its
final name, which is the commit; and calls fsync for the folders above. It is acknowledged after
that. Until the commit the folder has a name that no reader looks at, so there is no moment at which
half a checkpoint can be mistaken for one.
"""

import errno
import fcntl
import os
import secrets
import shutil
import time
import weakref
from contextlib import suppress
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
from shardopt.layout.span import Span
from shardopt.trace import OFF, Trace

UNFINISHED_PREFIX = ".unfinished-"
REMOVED_PREFIX = ".removed-"

_NUM_WRITERS = 4  # threads, which mostly wait for the disk
_NICENESS = 19
"""Of threads that write beside training: they take the time that it leaves.

Otherwise steps took 1.3 times as long meanwhile where every core computes. Now a save takes 1.5
times as long there.
"""
_YOUNG_S = 60.0


class Image(Protocol):
    """The content of a file to be written; see ``FileImage``."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        ...

    def piece(self, span: Span, buffer: Bytes) -> Bytes:
        """Return some bytes of the file, in ``buffer`` or elsewhere from a page on."""
        ...


def make_folder(path: Path) -> None:
    """Make a folder and those above it, which another job may be making at the same time."""
    if not path.is_dir():
        make_folder(path.parent)
        with suppress(FileExistsError):
            os.mkdir(path)


def make_unfinished(path: Path) -> None:
    """Make a folder that need not survive before it is committed."""
    make_folder(path.parent)
    os.mkdir(path)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # autofs has no fsync
            raise
    finally:
        os.close(fd)


def write_file(path: Path, image: Image, trace: Trace = OFF, *, is_beside: bool = False) -> str:
    """Write a new file durably, past the page cache where the file system allows it.

    Digests are of the bytes in memory, so that readers find what happens to them on their way.

    Args:
        path: The file.
        image: Its content.
        is_beside: Whether training goes on meanwhile, which comes first then.

    Returns:
        The digests of the chunks, one after another, in hexadecimal digits.

    Raises:
        OSError: The file cannot be written.
    """
    fd = _open_new(path)
    # Direct writes are of whole pages; the bytes behind the last one go through the cache.
    tail = image.nbytes // HEADER_ALIGNMENT * HEADER_ALIGNMENT
    buffers = local()

    def write_piece(span: Span) -> str:
        if not hasattr(buffers, "own"):
            buffers.own = aligned_empty(PIECE_NBYTES)
        piece = image.piece(span, buffers.own)
        with trace.span("hash", span):
            digests = [
                xxhash.xxh3_128_hexdigest(piece[chunk.index_in(span)].data)
                for chunk in span.chunks(CHUNK_NBYTES)
            ]
        with trace.span("write", span):
            _write_all(fd, piece[: tail - span.start].data, span.start)
        return "".join(digests)

    try:
        pieces = list(Span(0, image.nbytes).chunks(PIECE_NBYTES))
        digests = run_all(write_piece, pieces, _NUM_WRITERS, _yield_cores if is_beside else None)
        _write_through_cache(fd)
        rest = image.piece(Span(tail, image.nbytes), aligned_empty(HEADER_ALIGNMENT))
        _write_all(fd, rest.data, tail)
        with trace.span("sync"):
            os.fsync(fd)
    finally:
        os.close(fd)
    return "".join(digests)


def write_manifest(folder: Path, text: bytes) -> None:
    """Write the manifest durably, which makes a folder of files a checkpoint."""
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
    """Rename a finished folder to its final name.

    Raises:
        FileExistsError: Something has that name already.
        OSError: The new name cannot be made durable; the folder has its old name then.
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
    """Remove a checkpoint: first its name, so that nobody mistakes the remains for one."""
    trash = folder.with_name(f"{REMOVED_PREFIX}{secrets.token_hex(4)}-{folder.name}")
    with suppress(FileNotFoundError):  # another job may be removing it, too
        os.rename(folder, trash)
        sync_folder(folder.parent)
        shutil.rmtree(trash)


def discard(folder: Path) -> None:
    """Remove a folder that was never committed, as far as that is possible."""
    shutil.rmtree(folder, ignore_errors=True)


class FolderLock:
    """A shared lock that tells other jobs that a folder is being written.

    It is taken at once, and released by ``release``, with the object, or with the process.

    Args:
        folder: The folder.

    Attributes:
        release: Releases the lock; a second call does nothing.

    Raises:
        OSError: The folder cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.release = weakref.finalize(self, os.close, fd)
        with suppress(
            OSError
        ):  # some file systems have no locks; the folder's age protects it then
            fcntl.flock(fd, fcntl.LOCK_SH)


def stale_folders(directory: Path) -> list[Path]:
    """Find the folders that dead jobs have left unfinished in a directory of checkpoints."""
    return [
        folder
        for folder in directory.iterdir()
        if folder.name.startswith((UNFINISHED_PREFIX, REMOVED_PREFIX)) and _is_stale(folder)
    ]


def remove_stale_folders(directory: Path) -> None:
    """Remove the folders that dead jobs have left unfinished in a directory of checkpoints."""
    for folder in stale_folders(directory):
        discard(folder)


def _is_stale(folder: Path) -> bool:
    """Return whether a folder is old, and no living process of this machine writes there."""
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
    return os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)  # the first call may have made it


def _yield_cores() -> None:
    """Have this thread run when nothing else wants its core."""
    with suppress(OSError):  # a sandbox may forbid it
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)  # of the thread alone, on Linux


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
            _write_through_cache(fd)  # some file systems promise direct writes, and refuse them
