"""The MPI library and the launcher of this process, found without initializing MPI."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import mpi4py

from shardopt.cli.doctor.facts import Launcher, Library, Mpirun

# The launchers' names, the libraries they start, and their variables for the number of processes
# and for the rank. All may be set within a Slurm job: the innermost launcher comes first.
_LAUNCHERS = (
    ("Open MPI's mpirun", "Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPICH's mpirun", "MPICH", "PMI_SIZE", "PMI_RANK"),
    ("Slurm's srun", None, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
_NAME = re.compile(
    r"(?:MPI VERSION\s*:\s*)?(?P<name>.+?)\s+"
    r"(?:Library\s+)?(?:[Vv]ersion\s*:?\s*|v)?(?P<version>\d[\w.]*)"
)
_FILE = re.compile(r"(/.*/libmpi(?:ch)?\.so[^/\s]*)$", re.MULTILINE)
_ANSWER_S = 10


def find_launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Return the launcher that started this process, or None if there was none."""
    for name, family, size, rank in _LAUNCHERS:
        found = environ.get(size, ""), environ.get(rank, "")
        if all(text.isdecimal() for text in found):
            if family == "MPICH" and "SLURM_STEP_NUM_TASKS" in environ:
                name, family = "Slurm's srun, or MPICH's mpirun", None
            return Launcher(name, family, int(found[0]), int(found[1]))
    return None


def find_mpirun() -> Mpirun | None:
    """Return the mpirun that a shell finds, or None; runs ``mpirun --version``."""
    path = shutil.which("mpirun")
    if path is None:
        return None
    try:
        command = [path, "--version"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return Mpirun(path, None)
    if re.search(r"Open MPI|PRRTE", done.stdout):
        return Mpirun(path, "Open MPI")
    return Mpirun(path, "MPICH" if re.search("HYDRA|Intel", done.stdout) else None)


def describe_library() -> Library:
    """Describe the library that mpi4py has loaded."""
    from mpi4py import MPI  # here: the caller has kept mpi4py from initializing MPI

    first_line = MPI.Get_library_version().strip("\0\n ").split("\n")[0]
    name, version = parse_name(first_line)
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    path = _find_file()
    mpirun = path and Path(path).parents[1] / "bin" / "mpirun"
    return Library(
        name=name,
        version=version,
        standard=".".join(map(str, MPI.Get_version())),
        path=path,
        mpirun=str(mpirun) if mpirun and mpirun.exists() else None,
        mpi4py=mpi4py.__version__,
        thread_level=levels[MPI.Query_thread()] if MPI.Is_initialized() else None,
        cuda_aware=_ask_for_cuda(path) if MPI.Is_initialized() else None,
    )


def parse_name(first_line: str) -> tuple[str, str]:
    """Split a library's description of itself into name and version."""
    match = _NAME.match(first_line)
    return (match["name"], match["version"]) if match else (first_line[:40], "")


def _find_file() -> str | None:
    try:
        match = _FILE.search(Path("/proc/self/maps").read_text(encoding="utf-8"))
    except OSError:  # not Linux
        return None
    return match[1] if match else None


def _ask_for_cuda(path: str | None) -> bool | None:
    """Ask by an extension of Open MPI's, which MPICH has too; None if it is missing."""
    try:
        return bool(ctypes.CDLL(path).MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return None
