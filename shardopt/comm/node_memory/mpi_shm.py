"""The shared memory that the MPI library itself takes in ``/dev/shm``; shardopt takes none there.

MPICH takes everything while MPI starts, and nothing afterwards: 1 MiB per rank of its own and
4.1 MiB per rank for UCX, which carries its messages. UCX can do without (``UCX_TLS=^posix``); if
it finds room for some ranks only, MPI may die by a segmentation fault while it starts. Without
room for its own part it dies by a bus error. A job that has started has all it needs.

Open MPI reserves 16 MiB per rank, of which messages fill about 2 MiB. It takes nothing where less
than 16 MiB are free: ranks of a node then send their messages through the network stack.
"""

import os
from collections.abc import Mapping

from shardopt.errors import SharedMemoryError

MPI_SHM_FOLDER = "/dev/shm"

_MPICH_NBYTES = 1100 << 10  # per rank; measured with 5.0.2 on 1 to 16 ranks, as is the next
_UCX_NBYTES = 4240 << 10
_UCX_POSIX = frozenset({"all", "posix", "mm", "shm", "sm"})  # names in UCX_TLS that include it
OPENMPI_RESERVED_NBYTES = 16 << 20
_OPENMPI_NBYTES = 2560 << 10


def mpi_shm_nbytes(library: str, num_ranks: int, environ: Mapping[str, str] = os.environ) -> int:
    """Return the bytes of ``/dev/shm`` that the MPI library fills on a node; 0 if not known.

    Args:
        library: The text of ``MPI.Get_library_version()``.
        num_ranks: Ranks of the node.
        environ: The environment of the job.
    """
    if library.startswith("Open MPI"):
        return _OPENMPI_NBYTES * num_ranks
    if not library.startswith("MPICH"):
        return 0
    uses_ucx = "ch4:ucx" in library and _uses_posix(environ.get("UCX_TLS", "all"))
    return (_MPICH_NBYTES + (_UCX_NBYTES if uses_ucx else 0)) * num_ranks


def mpi_shm_shortage(
    library: str, num_ranks: int, size_nbytes: int, environ: Mapping[str, str] = os.environ
) -> SharedMemoryError | None:
    """Return an error if MPICH is likely to die while MPI starts; to be called before that.

    Afterwards there is nothing to check: MPICH has replaced what it found no room for, or has died.
    Open MPI survives in every case.

    Args:
        library: The text of ``MPI.Get_library_version()``, which works before MPI starts.
        num_ranks: Ranks of the node.
        size_nbytes: The size of ``/dev/shm``. Free space would depend on who starts first.
        environ: The environment of the job.
    """
    needed_nbytes = mpi_shm_nbytes(library, num_ranks, environ)
    if not library.startswith("MPICH") or needed_nbytes <= size_nbytes:
        return None
    without_ucx = _MPICH_NBYTES * num_ranks
    other = "set UCX_TLS=^posix, " if without_ucx <= size_nbytes < needed_nbytes else ""
    return SharedMemoryError(
        f"{MPI_SHM_FOLDER} must have {needed_nbytes:,} bytes for the messages of MPICH on "
        f"{num_ranks} ranks; got {size_nbytes:,} bytes, with which MPI may die by a bus error or a "
        "segmentation fault while it starts. Enlarge it (docker run --shm-size=..., mount -o "
        f"remount,size=... {MPI_SHM_FOLDER}), {other}or start fewer ranks on the node."
    )


def read_mpi_shm_size() -> int:
    """Return the size of ``/dev/shm`` in bytes; 0 if there is none."""
    try:
        status = os.statvfs(MPI_SHM_FOLDER)
    except OSError:
        return 0
    return status.f_blocks * status.f_frsize


def _uses_posix(transports: str) -> bool:
    """Return whether UCX may use POSIX shared memory, by its setting ``UCX_TLS``."""
    excludes = transports.startswith("^")
    named = not _UCX_POSIX.isdisjoint(transports.lstrip("^").split(","))
    return named != excludes
