"""What is lost on a cluster is named in time, by all that are left, and the run goes on without it.

Ranks are judged by their processes and by their last words, each in a file. Open MPI's mpirun has
faults of its own: when a host is lost its exit code may be 0, and when a host falls silent it stays
when all ranks are gone.
"""

import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from shardopt.checkpoint.format.directory import list_checkpoints
from tests.conftest import kill_with_ranks, read_job_env
from tests.support.cluster import Cluster

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 4
GRACE_S = 10
PATIENCE_S = 45  # for what may take its time

LAUNCHERS = {  # options for hosts, which take over from those that cluster.sh would set
    "mpich": lambda hosts, slots: [
        *("-launcher", "ssh", "-iface", "eth0"),
        *("-hosts", ",".join(f"h{host}:{slots}" for host in hosts)),
    ],
    "openmpi": lambda hosts, slots: [
        *("--prtemca", "plm_ssh_agent", "ssh", "--map-by", "slot", "--bind-to", "none"),
        *("--host", ",".join(f"h{host}:{slots}" for host in hosts)),
    ],
}
NAMED = re.compile(
    r"RankFailureError: timed out after \d+\.\d s in step \d+ \([^()]+(?:\(\))?\): "
    r"no sign of (.*?)(?:; .*)?\. Check whether"
)


@dataclass(frozen=True)
class Place:
    """Hosts of a cluster, by number, and the ranks on each."""

    cluster: Cluster
    hosts: tuple[int, ...]
    slots: int
    library: str

    def without(self, host):
        return Place(
            self.cluster, tuple(h for h in self.hosts if h != host), self.slots, self.library
        )

    def ranks_on(self, host):
        first = self.hosts.index(host) * self.slots
        return set(range(first, first + self.slots))

    def host_of(self, rank):
        return self.hosts[rank // self.slots]

    @property
    def ranks(self):
        return set(range(len(self.hosts) * self.slots))


class Steady:
    """A job of steady.py; mpirun runs on the first host."""

    def __init__(self, place, directory, *options):
        self.place = place
        self.directory = directory
        self.processes = {}  # of the ranks, once it steps
        self._output = directory / f"output-{len(list(directory.glob('output-*')))}"
        self._command = [sys.executable, "-m", "tests.support.worker", directory, *options]
        self._command += ["--timeout-s", TIMEOUT_S]
        self._command = list(map(str, self._command))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = read_job_env() | {"PYTHONPATH": path, "OMPI_MCA_mpi_yield_when_idle": "1"}
        self.mpirun = place.cluster.start_on(
            place.hosts[0],
            *("sh", "-c", 'exec "$@" >"$0" 2>&1', self._output),
            place.cluster.mpirun.program,
            *LAUNCHERS[place.library](place.hosts, place.slots),
            *("-n", str(len(place.ranks))),
            *("env", *(f"{name}={value}" for name, value in variables.items())),
            *self._command,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.mpirun.poll() is None:
            kill_with_ranks(self.mpirun)
        self.mpirun.communicate()

    def run_on_to(self, step):
        """Wait until there is a checkpoint of this step or a later one."""
        deadline = time.monotonic() + PATIENCE_S
        while last_step(self.directory) < step:
            assert self.mpirun.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)
        self.processes = self._find_processes()
        assert set(self.processes) == self.place.ranks

    def assert_gone_in_time(self):
        """No process of a rank may be left, on any host."""
        _, alive = psutil.wait_procs(self.processes.values(), timeout=TIMEOUT_S + GRACE_S)
        alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        assert not alive, self.text

    @property
    def text(self):
        """All that was printed."""
        return self._output.read_text(errors="replace")

    def last_words(self):
        """What each rank raised, of those that were not ended before they came to it."""
        paths = self.directory.glob("last-words-*")
        return {int(path.name.rpartition("-")[2]): path.read_text() for path in paths}

    def _find_processes(self):
        found = {}
        for process in psutil.process_iter():
            try:
                if process.cmdline() == self._command:
                    env = process.environ()
                    found[int(env.get("PMI_RANK") or env["OMPI_COMM_WORLD_RANK"])] = process
            except psutil.NoSuchProcess:
                continue
        return found


def last_step(directory):
    return max((folder.step for folder in list_checkpoints(directory)), default=0)


def take_away(job, fault, victim):
    """Kill a rank; or kill a host, cut its cable or lose what is sent to it and from it."""
    if fault == "rank":
        job.processes[victim].kill()
    else:
        getattr(job.place.cluster, fault)(victim)


def assert_named(job, victim):
    """On either side of the gap the ranks of the other are lost, with their hosts, and no others.

    Ranks whose launcher ends them first say nothing.
    """
    place, words = job.place, job.last_words()
    beyond = place.ranks_on(victim)
    assert words.keys() - beyond, job.text
    for rank, said in words.items():
        lost = place.ranks - beyond if rank in beyond else beyond
        match = NAMED.match(said)
        assert match, said
        named = match[1].split(", ")
        assert [f"rank {r} on h{place.host_of(r)}" for r in sorted(lost)] == [
            name.partition(" (")[0] for name in named
        ], said
        assert all(re.search(r" \(last seen in step \d+\)$", name) for name in named), said


def assert_exit_code(job, fault):
    """It must not be 0, where mpirun is up to it."""
    if job.place.library == "openmpi" and fault in ("cut", "drop"):
        return
    code = job.mpirun.wait(timeout=PATIENCE_S)
    lost_daemon = "PRTE has lost communication with a remote daemon"
    assert code != 0 or lost_daemon in job.text, job.text


def assert_ends(job, fault, victim, delay_s=0.0):
    """Take something away from a job that steps: all others must end, in time and by name."""
    host = job.place.host_of(victim) if fault == "rank" else victim
    job.run_on_to(20)
    time.sleep(delay_s)
    take_away(job, fault, victim)
    job.assert_gone_in_time()
    assert_exit_code(job, fault)
    if fault in ("cut", "drop"):
        assert_named(job, host)
    # Whoever sees a connection break first ends the job: mpirun, unless it was lost, or Open
    # MPI itself within a rank, which may not say whose connection it was.
    elif host != job.place.hosts[0] and "occurred in Socket closed" not in job.text:
        assert re.search(rf"\bh{host}\b", job.text), job.text
    return host


def assert_goes_on(place, directory, *options):
    """A new job must begin where the last checkpoint is."""
    step = last_step(directory)
    with Steady(place, directory, "--steps", "15", *options) as job:
        assert job.mpirun.wait(timeout=PATIENCE_S) == 0, job.text
        assert f"from step {step}\n" in job.text
        assert f"to step {step + 15}\n" in job.text
    assert last_step(directory) == step + 10


@pytest.fixture
def place(cluster, library):
    return lambda num_hosts, slots: Place(
        cluster(num_hosts, slots=slots), tuple(range(1, num_hosts + 1)), slots, library
    )


@pytest.fixture
def library(mpirun):
    """Whose mpirun it is."""
    told = subprocess.run([mpirun.program, "--version"], capture_output=True, text=True, check=True)
    return "openmpi" if "Open MPI" in told.stdout else "mpich"


@pytest.mark.parametrize("fault", ["rank", "kill"])
def test_what_dies_ends_the_job(place, tmp_path, fault):
    with Steady(place(2, 1), tmp_path) as job:
        assert_ends(job, fault, victim={"rank": 1, "kill": 2}[fault])


def test_a_host_that_falls_silent_is_named_and_the_run_goes_on_without(place, tmp_path, library):
    with Steady(place(2, 2), tmp_path) as job:
        host = assert_ends(job, {"mpich": "cut", "openmpi": "drop"}[library], victim=2)
    assert_goes_on(job.place.without(host), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_anything_may_be_lost_at_any_time(place, tmp_path, seed):
    rng = random.Random(seed)
    num_hosts, slots = rng.choice([(2, 2), (3, 1)])
    fault = ("rank", "kill", "cut", "drop")[seed % 4]
    victim = rng.randrange(num_hosts * slots) if fault == "rank" else rng.randint(1, num_hosts)
    framework, delay_s = rng.choice(["numpy", "torch"]), rng.uniform(0, 2)
    print(f"{fault} {victim} of {num_hosts} hosts with {slots} ranks, {framework}, {delay_s:.2f} s")
    options = ("--framework", framework)
    with Steady(place(num_hosts, slots), tmp_path, *options) as job:
        host = assert_ends(job, fault, victim, delay_s)
    assert_goes_on(job.place.without(host), tmp_path, *options)
