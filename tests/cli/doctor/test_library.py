"""The MPI library and the launcher, recognized by their names and variables."""

from dataclasses import replace

import pytest

from shardopt.cli.doctor import library
from tests.support.doctor import MPICH


@pytest.mark.parametrize(
    ("line", "name", "family"),
    [
        ("MPICH Version:      5.0.2", ("MPICH", "5.0.2"), "MPICH"),
        ("MVAPICH Version      :\t4.1", ("MVAPICH", "4.1"), "MPICH"),
        ("Open MPI v5.0.11, package: Open MPI x", ("Open MPI", "5.0.11"), "Open MPI"),
        ("Intel(R) MPI Library 2021.9 for Linux* OS", ("Intel(R) MPI", "2021.9"), "MPICH"),
        (
            "MPI VERSION    : CRAY MPICH version 8.1.29.8 (ANL base 3.4a2)",
            ("CRAY MPICH", "8.1.29.8"),
            "MPICH",
        ),
        ("MVAPICH2 Version      :\t2.3.7", ("MVAPICH2", "2.3.7"), "MPICH"),
        ("something else", ("something else", ""), "something else"),
    ],
)
def test_names_of_libraries(line, name, family):
    assert library.parse_name(line) == name
    assert replace(MPICH, name=name[0]).family == family


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, ("MPICH", 2, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"}, ("Open MPI", 3, 0)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (None, 4, 3)),
        (
            {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "PMI_SIZE": "4", "PMI_RANK": "2"},
            (None, 4, 2),
        ),
    ],
)
def test_launchers(environ, found):
    launcher = library.find_launcher(environ)
    assert (launcher and (launcher.family, launcher.num_processes, launcher.rank)) == found
