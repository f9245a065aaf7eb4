"""The fixture ``cluster``: several hosts on this machine, for tests of jobs on several nodes.

``cluster.sh --help`` says what they are. They are gone after the test, and also when pytest is
killed: their standard input ends then.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from tests.conftest import Job, Mpirun, kill_with_ranks, read_job_env

SCRIPT = Path(__file__).with_name("cluster.sh")


@dataclass(frozen=True)
class Traffic:
    """Bytes that have gone through a host's ``eth0``."""

    sent: int
    received: int


class ClusterMpirun(Mpirun):
    """Starts jobs on host 1, whose ranks are on all hosts: ``slots`` on the first, and so on."""

    def __init__(self, folder: Path, prefix: Sequence[str]) -> None:
        super().__init__(folder)
        self.prefix = prefix

    def before_python(self, env: Mapping[str, str]) -> Sequence[str]:
        """Set what Open MPI would not take along to another host."""
        env = read_job_env() | dict(env)
        if "PYTHONPATH" in os.environ:
            env = {"PYTHONPATH": os.environ["PYTHONPATH"]} | env
        return ["env", *(f"{name}={value}" for name, value in env.items())]


class Cluster:
    """Hosts h1 to hN; as a context manager, up to the end of the block.

    Attributes:
        mpirun: Starts MPI jobs on the hosts, and is used like the fixture ``mpirun``.
    """

    def __init__(self, folder: Path, num_hosts: int, rate: str | None = None, slots: int = 1):
        """Start the hosts.

        Args:
            folder: Where jobs run, and where their scripts are written.
            num_hosts: How many.
            rate: What each host may send, as in ``"100mbit"``; without a limit when None.
            slots: Ranks that mpirun puts on a host before it goes on to the next.
        """
        self.folder = folder
        self._dir = tempfile.mkdtemp(prefix="cluster-")  # short: it is part of sockets' names
        settings = ("--rate", rate or "none", "--slots", str(slots))
        self._hold = subprocess.Popen(
            self._command("hold", str(num_hosts), *settings),
            stdin=subprocess.PIPE,  # nobody else can write to it, so it ends with this process
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for pytest
        )
        assert self._hold.stdout
        said = self._hold.stdout.readline()
        if not said.startswith("up: "):
            raise RuntimeError(said + self.close())
        self.mpirun = ClusterMpirun(folder, self._command("run"))

    def _command(self, *words: str) -> list[str]:
        return ["env", f"CLUSTER_DIR={self._dir}", "bash", str(SCRIPT), *words]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> str:
        """End all that runs on the hosts, and the hosts; return what was printed meanwhile."""
        output, _ = self._hold.communicate(timeout=30)
        shutil.rmtree(self._dir, ignore_errors=True)
        return output

    def do(self, *words: str | int) -> str:
        """Run a command of ``cluster.sh``; return what it printed."""
        command = self._command(*map(str, words))
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def cut(self, host: int) -> None:
        """Pull a host's cable."""
        self.do("cut", host)

    def drop(self, host: int) -> None:
        """Lose silently all that is sent to or from a host."""
        self.do("drop", host)

    def heal(self, host: int) -> None:
        """Undo ``cut`` and ``drop``."""
        self.do("heal", host)

    def kill(self, host: int) -> None:
        """Kill all processes of a host; its connections are closed."""
        self.do("kill", host)

    def boot(self, host: int) -> None:
        """Start a host again after ``kill``."""
        self.do("boot", host)

    def rate(self, rate: str | None) -> None:
        """Limit what each host may send."""
        self.do("rate", rate or "none")

    def bytes(self) -> dict[int, Traffic]:
        """Count what has gone through each host's ``eth0``; the keys are the hosts, from 1."""
        found = re.findall(r"h(\d+) sent (\d+) received (\d+)", self.do("bytes"))
        return {int(host): Traffic(int(sent), int(received)) for host, sent, received in found}

    def start_on(
        self, host: int, *command: str | Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a host, in ``folder``, and leave it to the caller to end it."""
        return subprocess.Popen(
            [*self._command("on", str(host)), *map(str, command)],
            cwd=self.folder,
            env=os.environ | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def on(
        self,
        host: int,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60,
    ) -> Job:
        """Run a command on a host, to its end."""
        process = self.start_on(host, *command, env=env)
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            stdout, stderr = kill_with_ranks(process)
            pytest.fail(f"must end within {timeout_s} s; did not, and printed:\n{stdout}{stderr}")
        return Job(process.returncode, stdout, stderr)


@pytest.fixture(scope="session")
def can_have_clusters() -> None:
    """Skip where there can be none."""
    check = subprocess.run(["bash", SCRIPT, "check"], capture_output=True, text=True, check=False)
    if check.returncode:
        pytest.skip(check.stderr.strip())


@pytest.fixture
def cluster(can_have_clusters: None, mpirun: Mpirun) -> Iterator[Callable[..., Cluster]]:
    """Make clusters with ``cluster(num_hosts, rate=None, slots=1)``, up to the test's end.

    As it asks for ``mpirun``, tests that use it run once with every MPI.
    """
    with ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(
            Cluster(mpirun.folder, *args, **settings)
        )
