"""Schedulers, containers and the source of Python, found and named."""

from dataclasses import replace

import pytest

from shardopt.cli.doctor.environment import find_environment
from shardopt.cli.doctor.finding import Level
from tests.support.doctor import MPICH, judge, make_job


@pytest.mark.parametrize(
    ("environ", "files", "found"),
    [
        ({}, (), ()),
        ({"SLURM_JOB_ID": "7", "APPTAINER_CONTAINER": "/x.sif"}, (), ("Slurm job 7", "Apptainer")),
        ({"SINGULARITY_CONTAINER": "/x.sif"}, (".dockerenv",), ("Apptainer",)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, (".dockerenv",), ("Kubernetes", "Docker")),
        ({"PBS_JOBID": "7.head"}, ("run/.containerenv",), ("PBS job 7.head", "Podman")),
        ({}, ("env/conda-meta/history",), ("conda",)),
        ({"CONDA_PREFIX": "/other"}, (), ()),  # active, but its Python is not the one that runs
        ({}, ("base/.spack/spec.json",), ("Spack",)),
        ({"SPACK_ENV": "/spack/env"}, (), ("Spack environment /spack/env",)),
    ],
)
def test_surroundings_are_found(tmp_path, environ, files, found):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    prefixes = str(tmp_path / "env"), str(tmp_path / "base")
    assert find_environment(environ, prefixes, tmp_path) == found
    if found == ("conda",):
        assert find_environment({"CONDA_PREFIX": prefixes[0]}, prefixes, tmp_path / "x") == found


def test_the_report_names_them():
    job = make_job(environment=("Slurm job 7", "conda"), prefix="/opt/env")
    assert judge(job, "environment").text == "Slurm job 7, conda; Python is in /opt/env."
    assert judge(job, "environment").level is Level.OK
    assert judge(replace(job, environment=()), "environment").text.startswith("no scheduler")
    for name, known in ("CRAY MPICH", "Cray MPICH"), ("Intel(R) MPI", "Intel MPI"):
        site = replace(job, library=replace(MPICH, name=name))
        assert f"{known} is the site's MPI" in judge(site, "environment").text
