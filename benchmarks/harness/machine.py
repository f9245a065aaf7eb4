"""The machine, commit and versions that a result comes from."""

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import ROOT


@dataclass(frozen=True, slots=True)
class Origin:
    """Where and when something was measured.

    Attributes:
        date: Time of the end of the run, in ISO format.
        commit: The commit measured, with ``+`` where tracked files of the package differ from it;
            the variable ``COMMIT`` where git has no answer.
        machine: Its processor (``cpu``) and number of ``cores``; the ``gpu`` if one was used.
        mpi: The MPI library, for example ``MPICH 5.0.2``.
        versions: Of Python and of the packages that matter.
    """

    date: str
    commit: str
    machine: Mapping[str, Any]
    mpi: str
    versions: Mapping[str, str]


def this_run() -> Origin:
    """Return the origin of what is measured now."""
    return Origin(
        datetime.now(UTC).isoformat(timespec="seconds"),
        _commit(),
        _machine(),
        _mpi_library(),
        _versions(),
    )


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    machine = {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count()}
    cupy = sys.modules.get("cupy")
    if cupy is not None and cupy.cuda.is_available():
        machine["gpu"] = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return machine


def _commit() -> str:
    head = _git("rev-parse", "--short=10", "HEAD") or os.environ.get("COMMIT", "")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "shardopt")
    return f"{head}+" if head and changed else head or "none"


def _mpi_library() -> str:
    mpi = importlib.import_module("mpi4py.MPI")  # here, as cases are listed without MPI
    name, version = mpi.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("numpy", "numba", "mpi4py", "torch", "cupy-cuda12x", "cupy-cuda13x"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
