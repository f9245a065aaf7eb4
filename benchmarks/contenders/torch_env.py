"""PyTorch, where it is installed: its threads and its process group over Gloo."""

import importlib
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mpi4py import MPI


def load_torch(threads: int) -> Any | None:
    """Import torch and give it as many threads; without it, say that its peers are left out."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        if MPI.COMM_WORLD.rank == 0:
            print("There is no torch here: its optimizers are left out.", flush=True)
        return None
    torch.set_num_threads(threads)
    return torch


@contextmanager
def gloo(comm: MPI.Intracomm, wanted: bool) -> Iterator[None]:
    """Make the ranks a process group of torch, if wanted.

    They meet where MASTER_ADDR says; else in a file if they are all on one machine, or on the
    machine of rank 0.

    Collective: every rank, on its way in and out.
    """
    if not wanted:
        yield
        return
    dist = importlib.import_module("torch.distributed")
    with tempfile.TemporaryDirectory() as folder:
        store = "env://"
        if "MASTER_ADDR" not in os.environ:
            store = _meeting_place(comm, comm.bcast(folder))
        dist.init_process_group("gloo", init_method=store, rank=comm.rank, world_size=comm.size)
        yield
        dist.destroy_process_group()
        comm.Barrier()


def _meeting_place(comm: MPI.Intracomm, folder: str) -> str:
    """Return where ranks find each other, as ``init_process_group`` takes it. Collective."""
    if len(set(comm.allgather(MPI.Get_processor_name()))) == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return f"file://{folder}/store"
    with socket.socket() as free:
        free.bind(("", 0))
        return str(comm.bcast(f"tcp://{socket.gethostname()}:{free.getsockname()[1]}"))


def new_group(ranks: Sequence[int]) -> Any:
    """Make a process group of some of the ranks. Collective: every rank, in the same order."""
    return importlib.import_module("torch.distributed").new_group(list(ranks))
