"""Fixtures and settings for every test; the ranks of a run with MPI are kept in step by in_step."""

import contextlib
import gc
import os
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
NO_NUMBER_CHANGES = (
    "torch",  # tests/nodes runs every front end on any number of ranks, with every MPI
    "jax",
    "test_lucid.py",
    "params",
    "test_compiling.py",
    "test_policy.py",
    "core/test_bad_input.py",  # tests/comm and test_bad_step.py have ranks disagree
    "core/test_bad_state.py",
    "devices/test_arrays.py",  # tests/devices/test_steps.py and test_nodes.py run always
    "devices/test_memory.py",
    "devices/test_offload.py",
    "devices/test_order.py",
    "devices/test_params.py",
    "devices/test_state.py",
    "devices/test_writes.py",
    "checkpoint/test_damage.py",  # files
    "checkpoint/test_disk_faults.py",
    "checkpoint/test_whole_model.py",
    "checkpoint/test_partial.py",
    "checkpoint/test_other_models.py",
)
"""What one rank and three show: a third is neither first nor last, and divides nothing evenly."""

NO_MPI_CHANGES = (
    *NO_NUMBER_CHANGES,
    "core/test_writes.py",  # node memory is no MPI's; tests/comm/node_memory runs with every MPI
    "core/test_unequal_writes.py",
    "core/test_state_view.py",
    "core/test_sixteen_bits.py",  # arithmetic
    "core/test_edited_groups.py",  # settings
    "core/test_settings.py",
    "devices/test_checkpoints.py",
    "checkpoint/test_alignment.py",  # files
    "checkpoint/test_bad_rng.py",
    "checkpoint/test_interop.py",
    "checkpoint/test_odd_models.py",
    "checkpoint/test_power_loss.py",
)
LEFT_OUT = {"ranks": NO_NUMBER_CHANGES, "mpi-ranks": NO_MPI_CHANGES}
"""By part, files that need not even be imported."""

pytest_plugins = ["tests.support.in_step", "tests.support.cluster", "tests.support.gpu"]


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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option for tests/run.sh, which runs some tests side by side or with one MPI only."""
    parser.addoption(
        "--part",
        choices=["plain", "jobs", "mpi-jobs", "ranks", "mpi-ranks"],
        help="of the tests without ranks: those that start no mpirun, those that do, "
        "or those of them that are not marked any_mpi; of the tests on ranks: those that a number "
        "of ranks may change, or those of them that are not marked any_mpi",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files of which ``--part`` leaves out every test on ranks."""
    left_out = LEFT_OUT.get(config.getoption("--part"), ())
    return True if any(collection_path == TESTS / name for name in left_out) else None


def pytest_collection() -> None:
    """Collect no garbage while frameworks are imported; see ``pytest_collection_finish``."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Have garbage looked for in what tests make, not among a million objects of frameworks.

    Each rank would stop to search them at moments of its own, while the others wait for it.
    """
    gc.freeze()
    gc.enable()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests that start mpirun themselves."""
    if "mpirun" in getattr(item, "fixturenames", ()):
        item.add_marker("mpirun")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long forms of tests, unless ``-m`` speaks of them, and what ``--part`` does."""
    part, with_long = config.getoption("--part"), "long" in config.getoption("-m")

    def runs_now(item: pytest.Item) -> bool:
        marks = {mark.name for mark in item.iter_markers()}
        if "long" in marks and not with_long:
            return False
        if part == "plain":
            return "mpirun" not in marks
        if part == "mpi-ranks":
            return "any_mpi" not in marks
        return part in (None, "ranks") or (
            "mpirun" in marks and not (part == "mpi-jobs" and "any_mpi" in marks)
        )

    config.hook.pytest_deselected(items=[item for item in items if not runs_now(item)])
    items[:] = filter(runs_now, items)


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
            script.write_text(textwrap.dedent(source), encoding="utf-8")
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
