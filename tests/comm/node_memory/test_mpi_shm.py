"""What an MPI library needs in ``/dev/shm``, told before it starts, and tried."""

import re

import pytest

from shardopt.comm.node_memory.mpi_shm import mpi_shm_nbytes, mpi_shm_shortage
from tests.support.shm import limit_shm

MPICH = "MPICH Version:      5.0.2\nMPICH Device: ch4:ucx ofi\n"
MPICH_OFI = "MPICH Version:      4.3.0\nMPICH Device: ch4:ofi\n"
OPENMPI = "Open MPI v5.0.11, package: Open MPI x"
DOCKER_NBYTES = 64 << 20

TALK = """
import os
from mpi4py import MPI
import numpy as np

comm = MPI.COMM_WORLD
comm.Barrier()
size = os.statvfs("/dev/shm")
used = [(size.f_blocks - size.f_bfree) * size.f_frsize]
others = [rank for rank in range(comm.size) if rank != comm.rank]
own = [comm.Dup() for _ in range(4)] + [comm.Split_type(MPI.COMM_TYPE_SHARED)]
for numel in (1, 1000, 30_000, 1_000_000):
    sent, got = np.ones(numel), np.zeros((comm.size, numel))
    sends = [comm.Isend(sent, rank) for rank in others for _ in range(8)]
    comm.Barrier()
    for rank in others:
        for _ in range(8):
            comm.Recv(got[rank], rank)
    MPI.Request.Waitall(sends)
    assert got.sum() == numel * len(others)
    for one in own:
        total = np.ones(numel)
        one.Allreduce(MPI.IN_PLACE, total)
        assert total.sum() == numel * comm.size
        one.Ibarrier().Wait()
comm.Barrier()
size = os.statvfs("/dev/shm")
used.append((size.f_blocks - size.f_bfree) * size.f_frsize)
if comm.rank == 0:
    print("talked", *used)
"""


def talk(mpirun, num_ranks, size, **environ):
    """Send messages of all kinds in a job with a small /dev/shm; return what it takes there."""
    job = mpirun(num_ranks, source=TALK, options=limit_shm(mpirun, size), env=environ)
    assert job.returncode == 0, job.output
    return [int(word) for word in re.search(r"talked (\d+) (\d+)", job.stdout).groups()]


def is_mpich():
    from mpi4py import MPI

    return MPI.Get_library_version().startswith("MPICH")


def test_messages_of_8_ranks_fit_the_default_of_containers(mpirun):
    talk(mpirun, 8, "64m")


def test_what_mpi_takes_is_what_is_said(mpirun):
    from mpi4py import MPI

    at_first, at_last = talk(mpirun, 4, "1g")
    told = mpi_shm_nbytes(MPI.Get_library_version(), 4)
    assert at_last <= told
    if is_mpich():
        assert at_first == at_last  # hence nothing can be missing later
        assert told < 1.05 * at_last


def test_open_mpi_needs_nothing(mpirun):
    if is_mpich():
        pytest.skip("MPICH needs a little")
    talk(mpirun, 4, "4k")


def test_mpich_without_posix_shared_memory_needs_little(mpirun):
    if not is_mpich():
        pytest.skip("only MPICH needs it")
    talk(mpirun, 8, "9m", UCX_TLS="^posix")


@pytest.mark.parametrize(
    ("library", "num_ranks", "environ", "remedy"),
    [
        (MPICH, 12, {}, None),
        (MPICH, 13, {}, "set UCX_TLS=^posix, or start fewer"),
        (MPICH, 13, {"UCX_TLS": "^posix"}, None),
        (MPICH, 13, {"UCX_TLS": "tcp,sysv,self"}, None),
        (MPICH, 13, {"UCX_TLS": "tcp,sm"}, "set UCX_TLS=^posix, or start fewer"),
        (MPICH, 13, {"UCX_TLS": "^cuda,tcp"}, "set UCX_TLS=^posix, or start fewer"),
        (MPICH, 100, {}, "/dev/shm), or start fewer"),
        (MPICH_OFI, 13, {}, None),
        (MPICH_OFI, 100, {}, "/dev/shm), or start fewer"),
        (OPENMPI, 1000, {}, None),
        ("Intel(R) MPI Library 2021.9", 1000, {}, None),
    ],
)
def test_libraries(library, num_ranks, environ, remedy):
    error = mpi_shm_shortage(library, num_ranks, DOCKER_NBYTES, environ)
    assert (error is None) == (remedy is None)
    if remedy:
        needed = mpi_shm_nbytes(library, num_ranks, environ)
        assert f"/dev/shm must have {needed:,} bytes for the messages of MPICH" in str(error)
        assert "got 67,108,864 bytes" in str(error)
        assert "docker run --shm-size=..." in str(error)
        assert remedy in str(error)
