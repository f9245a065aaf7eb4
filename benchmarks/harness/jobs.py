"""Jobs that this program starts itself: one process, or ranks under mpirun."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT

_MPI_ENV = ROOT / "tests" / "mpi.env"


def run_ranks(words: Sequence[str], ranks: int, timeout_s: float) -> tuple[int | None, str]:
    """Run this Python with other arguments, under mpirun if there are several ranks.

    Args:
        words: The arguments, for example ``["-m", "benchmarks", "step"]``.
        ranks: MPI ranks.
        timeout_s: Seconds after which the job is killed.

    Returns:
        The exit code, None if it was killed; and all that it printed.
    """
    command = [sys.executable, *words]
    if ranks > 1:
        command = [find_mpirun(), "-n", str(ranks), *command]
    job = subprocess.Popen(
        command,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        printed, _ = job.communicate(timeout=timeout_s)
    except BaseException as error:  # also what a signal raises: no rank may outlive this program
        job.terminate()  # mpirun ends its ranks
        try:
            printed, _ = job.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            job.kill()
            printed, _ = job.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return None, printed
    return job.returncode, printed


def find_mpirun() -> str:
    """Return the mpirun of this Python's environment, else the one on the path.

    Raises:
        FileNotFoundError: There is none.
    """
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise FileNotFoundError(
            f"mpirun must be beside {sys.executable} or on the PATH; got none. Install an MPI: "
            "pip install '.[mpich]'."
        )
    return found


def environment() -> dict[str, str]:
    """Return the environment of a job: what MPI needs, and this repository on the path."""
    lines = _MPI_ENV.read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**settings, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
