"""A look at ``/dev/shm`` before MPI starts, as a library that finds too little of it may crash."""

import re
from collections.abc import Mapping, Sequence

from shardopt.comm.node_memory.mpi_shm import mpi_shm_shortage, read_mpi_shm_size

# Of PRRTE, Hydra, PALS and Slurm, as in launch/rank_env.sh.
_NODE_RANKS = (
    *("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PALS_LOCAL_RANKID"),
    "SLURM_LOCALID",
)
_NODE_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PALS_LOCAL_SIZE")
_SLURM_SIZES = "SLURM_STEP_TASKS_PER_NODE"  # 2(x3),1: three nodes with two tasks, one with one


def why_not_start(environ: Mapping[str, str]) -> str | None:
    """Return why MPI may crash while it starts on this node, or None if it should not.

    All ranks of a node come to the same answer without talking to each other.
    """
    from mpi4py import MPI  # here: the caller has kept mpi4py from initializing MPI

    library, num_ranks = MPI.Get_library_version(), find_node_size(environ)
    shortage = mpi_shm_shortage(library, num_ranks, read_mpi_shm_size(), environ)
    return str(shortage) if shortage else None


def find_node_rank(environ: Mapping[str, str]) -> int:
    """Return the number of this process on its node; 0 if no launcher tells."""
    return _first(environ, _NODE_RANKS) or 0


def find_node_size(environ: Mapping[str, str]) -> int:
    """Return the number of processes of this node, or of the fullest in Slurm; 1 if not known."""
    slurm = [int(size) for size in re.findall(r"(?:^|,)(\d+)", environ.get(_SLURM_SIZES, ""))]
    return _first(environ, _NODE_SIZES) or max(slurm, default=1)


def _first(environ: Mapping[str, str], names: Sequence[str]) -> int | None:
    found = (int(environ[name]) for name in names if environ.get(name, "").isdecimal())
    return next(found, None)
