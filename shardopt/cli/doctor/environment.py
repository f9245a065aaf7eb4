"""The surroundings of this process: scheduler, container, and the source of its Python."""

import sys
from collections.abc import Mapping
from pathlib import Path

_JOBS = (("Slurm", "SLURM_JOB_ID"), ("PBS", "PBS_JOBID"))
_APPTAINER = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")
_MARKS = (("Docker", ".dockerenv"), ("Podman", "run/.containerenv"))


def find_environment(
    environ: Mapping[str, str],
    prefixes: tuple[str, str] = (sys.prefix, sys.base_prefix),
    root: Path = Path("/"),
) -> tuple[str, ...]:
    """Return the names of what this process runs in, for messages.

    Args:
        environ: The variables of the process.
        prefixes: The folders of its Python, and of the Python that a virtual environment is from.
        root: The root of the file system.
    """
    found = [f"{name} job {environ[key]}" for name, key in _JOBS if environ.get(key)]
    if environ.get("KUBERNETES_SERVICE_HOST"):
        found.append("Kubernetes")
    if any(environ.get(key) for key in _APPTAINER):
        found.append("Apptainer")
    else:
        found += [name for name, mark in _MARKS if (root / mark).exists()]
    conda, spack = environ.get("CONDA_PREFIX"), environ.get("SPACK_ENV")
    if any(prefix == conda or Path(prefix, "conda-meta").is_dir() for prefix in prefixes):
        found.append("conda")
    if spack or any(Path(prefix, ".spack").is_dir() for prefix in prefixes):
        found.append(f"Spack environment {spack}" if spack else "Spack")
    return tuple(found)
