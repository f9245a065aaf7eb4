"""The rate of a disk, written to as checkpoints are."""

import errno
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path

PIECE_NBYTES = 8 << 20  # bytes of a request, and
NUM_WRITERS = 4  # requests in flight, as in a save

_LONGEST_S = 5.0  # of writing: a slow disk is known by then


def measure_disk(folder: Path, nbytes: int) -> float:
    """Write past the page cache where that is possible, and until the disk has it all.

    The file has no name, so that nothing is left of it however this process ends.

    Args:
        folder: The folder to write in.
        nbytes: Bytes to write, rounded up to whole pieces of 8 MiB; fewer on a slow disk.

    Returns:
        Bytes/s.

    Raises:
        OSError: The folder cannot be written to.
    """
    with mmap(-1, PIECE_NBYTES) as piece:  # begins on a page
        piece.write(os.urandom(PIECE_NBYTES))
        fd = _open_unnamed(folder)
        try:
            return _write(fd, memoryview(piece), -(-nbytes // PIECE_NBYTES))
        finally:
            os.close(fd)


def _write(fd: int, piece: memoryview, count: int) -> float:
    def write(number: int) -> int:
        if number >= NUM_WRITERS and time.perf_counter() - start_s > _LONGEST_S:
            return 0
        return os.pwrite(fd, piece, number * PIECE_NBYTES)

    with piece, ThreadPoolExecutor(NUM_WRITERS) as pool:
        start_s = time.perf_counter()
        written = sum(pool.map(write, range(count)))
        os.fsync(fd)
        return written / (time.perf_counter() - start_s)


def _open_unnamed(folder: Path) -> int:
    """Open a new file without a name, for direct writes if the file system has them."""
    for flags in (os.O_TMPFILE | os.O_DIRECT, os.O_TMPFILE):
        try:
            return os.open(folder, os.O_WRONLY | flags, 0o600)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR):
                raise
    fd, path = tempfile.mkstemp(prefix=".shardopt-", dir=folder)  # such as NFS
    os.unlink(path)
    return fd
