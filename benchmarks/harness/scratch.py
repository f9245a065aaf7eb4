"""Files that are removed however a benchmark ends, and the speed of the disk by itself."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mpi4py import MPI

from benchmarks.harness.placing import Bytes

NUM_WRITERS = 4  # requests in flight, and
PIECE_NBYTES = 8 << 20  # bytes of each, as in shardopt's saves

# Waits for the end of its input, that is of the process which started it; other ranks may outlive
# that one, and write on for a while.
_REMOVE = 'cat; for i in $(seq 20); do rm -rf -- "$1" && [ ! -e "$1" ] && break; sleep 1; done'


@contextmanager
def scratch_folder(comm: MPI.Intracomm, parent: str | None) -> Iterator[Path]:
    """Make a folder for all ranks, and remove it even if the job is killed.

    Collective: every rank, on its way in and out.

    Args:
        comm: The ranks.
        parent: The folder that it is made in; None takes the system's for temporary files.
    """
    folder, remover = "", None
    if comm.rank == 0:
        folder = tempfile.mkdtemp(prefix="shardopt-benchmark-", dir=parent)
        remover = subprocess.Popen(
            ["sh", "-c", _REMOVE, "sh", folder], stdin=subprocess.PIPE, start_new_session=True
        )
    try:
        yield Path(comm.bcast(folder))
        comm.Barrier()
    finally:
        if remover is not None:
            remover.communicate()


def write_directly(path: Path, content: Bytes) -> None:
    """Write a new file of whole pages past the page cache, durably, as fast as the disk can.

    Args:
        path: The file.
        content: Begins on a page.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o666)

    def write(start: int) -> int:
        return os.pwrite(fd, content[start : start + PIECE_NBYTES].data, start)

    try:
        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            list(pool.map(write, range(0, content.size, PIECE_NBYTES)))
        os.fsync(fd)
    finally:
        os.close(fd)


class DirectWriter:
    """Writes as many bytes beside training, and nothing else: the least that a save must cost."""

    def __init__(self, path: Path, content: Bytes) -> None:
        self._path, self._content = path, content
        self._pool = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def begin(self, number: int) -> None:
        """See ``benchmarks.contenders.savers.Background``."""
        self._written = self._pool.submit(write_directly, self._path, self._content)

    def in_flight(self) -> bool:
        """See ``benchmarks.contenders.savers.Background``."""
        return self._written is not None and not self._written.done()

    def wait(self) -> None:
        """See ``benchmarks.contenders.savers.Background``."""
        if self._written is not None:
            self._written.result()

    def discard(self) -> None:
        """See ``benchmarks.contenders.savers.Background``."""
        self._path.unlink()
