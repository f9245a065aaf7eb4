"""Optimizers whose node has less /dev/shm than their parameters take: they use none of it."""

import pytest

from tests.support.shm import limit_shm

TRAIN = """
import os
import numpy as np
from mpi4py import MPI
from shardopt.numpy import NAdam, Parameter

comm = MPI.COMM_WORLD

def used():
    comm.Barrier()
    status = os.statvfs("/dev/shm")
    return status.f_blocks - status.f_bfree

before = used()
weight = Parameter(np.ones(4 << 20, np.float32), "weight")
opt = NAdam([weight], lr=1.0)
for _ in range(2):
    opt.zero_grad()
    weight.grad += comm.rank + 1.0
    opt.step()
assert weight.data.max() < 1.0
digests = comm.allgather(weight.data.tobytes()[:4096])
assert len(set(digests)) == 1
print("taken", used() - before)
opt.close()
"""


def loads_mpich():
    from mpi4py import MPI

    return MPI.Get_library_version().startswith("MPICH")


def test_parameters_take_nothing_of_dev_shm(mpirun):
    """The parameters and gradients of 8 ranks take 151 MB, MPICH itself 42 of the 64 MiB."""
    num_ranks, size = (8, "64m") if loads_mpich() else (4, "4k")
    job = mpirun(num_ranks, source=TRAIN, options=limit_shm(mpirun, size))
    assert job.returncode == 0, job.output
    assert job.stdout.count("taken 0") == num_ranks, job.output


@pytest.mark.any_mpi
def test_a_rank_whose_address_space_is_limited_raises_on_all(mpirun):
    source = """
    import resource
    import numpy as np
    from mpi4py import MPI
    from shardopt.errors import SharedMemoryError
    from shardopt.numpy import NAdam, Parameter

    params = [Parameter(np.ones(64 << 20, np.float32), "weight")]
    if MPI.COMM_WORLD.rank == 1:
        mapped = 1024 * int(open("/proc/self/status").read().split("VmSize:")[1].split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (256 << 20), resource.RLIM_INFINITY))
    try:
        NAdam(params)
    except SharedMemoryError as error:
        print("refused:", error)
    """
    job = mpirun(2, source=source)
    assert job.returncode == 0, job.output
    told = "refused: rank 1: the address space of a rank must have room for"
    assert job.stdout.count(told) == 2, job.output
