"""Fixtures and settings for every test; the ranks of a run with MPI are kept in step by in_step."""

import contextlib
import gc
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import psutil
import pytest

if TYPE_CHECKING:
    from mpi4py import MPI

    from shardopt.numpy import NAdam

TESTS = Path(__file__).parent
NEEDS_SCIPY = re.compile(r"\b(jax|lucid|optax|torch)\b")
WITHOUT_SCIPY = "import sys; sys.modules.update(scipy=None, yaml=None)  # for Numba, for nothing\n"
"""A fifth of the time that a rank takes to start."""

pytest_plugins = [
    "tests.support.in_step",
    "tests.support.parts",
    "tests.support.cluster",
    "tests.support.gpu",
]


def read_job_env() -> dict[str, str]:
    """The environment that MPI jobs of the tests get, from the file that says it once."""
    lines = Path(__file__).with_name("mpi.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def pytest_configure(config: pytest.Config) -> None:
    """Prepare this process for MPI without mpirun, or its examples for many ranks."""
    if config.pluginmanager.has_plugin("in-step"):
        # The ranks must draw the same examples, and go on to the next one together.
        hypothesis.settings.register_profile(
            "ranks",
            derandomize=True,
            max_examples=30,  # the same ones in every run
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
            suppress_health_check=[
                hypothesis.HealthCheck.function_scoped_fixture,  # comm
                hypothesis.HealthCheck.too_slow,
            ],
        )
        hypothesis.settings.load_profile("ranks")
        return
    hypothesis.settings.register_profile(
        "busy machine",
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("busy machine")
    # A lone process that initialises Open MPI would leave 16 MiB behind in /dev/shm.
    os.environ.update(read_job_env() | {"OMPI_MCA_btl": "self"})


def pytest_collection() -> None:
    """Collect no garbage while frameworks are imported; see ``pytest_collection_finish``."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Have garbage looked for in what tests make, not among a million objects of frameworks.

    Each rank would stop to search them at moments of its own, while the others wait for it.
    """
    gc.freeze()
    gc.enable()


@pytest.fixture
def comm() -> Iterator["MPI.Intracomm"]:
    """All ranks of the run, in a communicator of the test's own."""
    from mpi4py import MPI  # here, as most runs load this file without needing MPI

    comm = MPI.COMM_WORLD.Dup()
    yield comm
    comm.Free()


@pytest.fixture(scope="module")
def lasting_opt() -> Iterator["NAdam"]:
    """One optimizer for all tests of a file, on all ranks."""
    from mpi4py import MPI

    from tests.support.errors import make_optimizer, take_step

    with make_optimizer(MPI.COMM_WORLD) as opt:
        take_step(opt)
        yield opt


@pytest.fixture
def opt(lasting_opt: "NAdam") -> Iterator["NAdam"]:
    """An optimizer that must still step after the test."""
    from tests.support.errors import assert_steps

    yield lasting_opt
    assert_steps(lasting_opt)


@dataclass(frozen=True)
class Job:
    """What became of an mpirun."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Both streams, one after the other."""
        return self.stdout + self.stderr


class Mpirun:
    """Starts MPI jobs with the mpirun that belongs to this environment's MPI library."""

    def __init__(self, folder: Path) -> None:
        beside_python = Path(sys.executable).with_name("mpirun")
        self.program = str(beside_python) if beside_python.exists() else "mpirun"
        self.folder = folder
        self.options: Sequence[str] = ()  # for every job
        self.prefix: Sequence[str] = ()  # what starts it elsewhere

    def __call__(
        self,
        num_ranks: int,
        *args: str | Path,
        source: str | None = None,
        timeout_s: float = 60,
        env: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> Job:
        """Run ``mpirun -n num_ranks python args`` to its end.

        Args:
            num_ranks: Number of ranks.
            *args: Python's arguments: a script with its own, ``-m`` and a module, ...
            source: Text of a script, to be run with ``args`` as its arguments.
            timeout_s: When the job has not ended by then, every process of it is killed and the
                test fails with what the job had printed.
            env: Environment variables on top of the usual ones.
            options: Options for mpirun itself.
        """
        job = self.start(num_ranks, *args, source=source, env=env, options=options)
        try:
            stdout, stderr = job.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            stdout, stderr = kill_with_ranks(job)
            pytest.fail(f"the job did not end within {timeout_s} s; it printed:\n{stdout}{stderr}")
        return Job(job.returncode, stdout, stderr)

    def before_python(self, env: Mapping[str, str]) -> Sequence[str]:
        """What mpirun is to start each rank with; ``env`` is what the test adds."""
        return ()

    def start(
        self,
        num_ranks: int,
        *args: str | Path,
        source: str | None = None,
        env: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> subprocess.Popen[str]:
        """Start a job as a call does, and leave it to the caller to end it."""
        if source is not None:
            script = self.folder / "job.py"
            source = textwrap.dedent(source)
            if not NEEDS_SCIPY.search(source):
                source = WITHOUT_SCIPY + source
            script.write_text(source, encoding="utf-8")
            args = (script, *args)
        python = [*self.before_python(env or {}), sys.executable, *map(str, args)]
        return subprocess.Popen(
            [*self.prefix, self.program, *self.options, *options, "-n", str(num_ranks), *python],
            cwd=self.folder,
            env=os.environ | read_job_env() | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def kill_with_ranks(job: subprocess.Popen[str]) -> tuple[str, str]:
    """End an mpirun and its ranks, which are in sessions of their own; return what they printed."""
    family = psutil.Process(job.pid).children(recursive=True)
    job.terminate()  # lets mpirun tidy up
    try:
        return job.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        job.kill()
        return job.communicate()


@pytest.fixture
def mpirun(tmp_path: Path) -> Mpirun:
    """Start an MPI job from a test that is itself run without MPI, in the test's own folder."""
    return Mpirun(tmp_path)
