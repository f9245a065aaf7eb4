"""The ranks of a node, counted before MPI starts, and what they find in /dev/shm."""

import pytest
from mpi4py import MPI

from shardopt.cli.doctor import start


@pytest.mark.parametrize(
    ("environ", "rank", "size"),
    [
        ({}, 0, 1),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, 1, 3),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x3),11"}, 2, 11),
        (
            {
                **{"MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "4"},
                **{"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "1"},
            },
            *(0, 4),
        ),
        ({"MPI_LOCALRANKID": "", "MPI_LOCALNRANKS": "many"}, 0, 1),
    ],
)
def test_places_on_a_node(environ, rank, size):
    assert start.find_node_rank(environ) == rank
    assert start.find_node_size(environ) == size


@pytest.mark.parametrize(("num_ranks", "starts"), [("12", True), ("13", False)])
def test_whether_mpich_may_start(monkeypatch, num_ranks, starts):
    text = "MPICH Version:      5.0.2\nMPICH Device: ch4:ucx ofi\n"
    monkeypatch.setattr(MPI, "Get_library_version", lambda: text)
    monkeypatch.setattr(start, "read_mpi_shm_size", lambda: 64 << 20)
    assert (start.why_not_start({"MPI_LOCALNRANKS": num_ranks}) is None) == starts
