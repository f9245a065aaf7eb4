"""Start the jobs of ``benchmarks.cases.nodes`` on hosts of their own."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from benchmarks import ROOT
from benchmarks.cases.nodes import CASE, JobOptions, Options
from benchmarks.harness.options import words_of
from benchmarks.harness.record import read
from benchmarks.harness.result import Result

_TESTS = ROOT / "tests"
_MODULE = "benchmarks.cases.nodes.job"
_LIMIT_S = 300


def measure(options: Options) -> Iterator[Result]:
    """Run a job for each layout and MPI, and yield the results that they have written."""
    words = words_of(options, [field.name for field in fields(JobOptions)])
    for layout in options.layout:
        num_nodes, node_size = map(int, layout.split("x"))
        for python in options.python or (sys.executable,):
            with tempfile.TemporaryDirectory(prefix="nodes-") as out:
                with hosts(num_nodes, node_size, options.rate) as prefix:
                    run([*prefix, *command(python, num_nodes * node_size, _MODULE), out, *words])
                yield from read(CASE, Path(out))


@contextmanager
def hosts(num_hosts: int, slots: int, rate: str) -> Iterator[list[str]]:
    """Start hosts, up to the end of the block; yield what runs a command on the first."""
    folder = tempfile.mkdtemp(prefix="cluster-")
    script = ["env", f"CLUSTER_DIR={folder}", "bash", str(_TESTS / "support" / "cluster.sh")]
    hold = subprocess.Popen(
        [*script, "hold", str(num_hosts), "--rate", rate, "--slots", str(slots)],
        stdin=subprocess.PIPE,  # they are gone when it ends, with this process at the latest
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert hold.stdout is not None
        said = hold.stdout.readline()
        if not said.startswith("up: "):
            sys.exit(said + hold.communicate()[0])
        yield [*script, "run"]
    finally:
        hold.communicate(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def command(python: str, num_ranks: int, module: str) -> list[str]:
    """Return the command that starts a module on ranks, with the mpirun of an interpreter."""
    lines = (_TESTS / "mpi.env").read_text().splitlines()
    env = [line for line in lines if line and not line.startswith("#")]
    env += ["GLOO_SOCKET_IFNAME=eth0", "MASTER_ADDR=10.0.0.1", "MASTER_PORT=29500"]
    env += ["TORCH_CPP_LOG_LEVEL=ERROR"]  # it warns that addresses have no names
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env.append(f"PYTHONPATH={os.pathsep.join(paths)}")
    program = Path(python).absolute()  # not resolved: virtual environments link to another
    ranks = ["env", *env, str(program), "-m", module]
    return [str(program.with_name("mpirun")), "-n", str(num_ranks), *ranks]


def run(words: list[str], *, quiet: bool = False) -> None:
    """Run a job to its end, or end this program if it fails.

    Args:
        words: The command.
        quiet: Whether what it prints is of no interest.
    """
    out = subprocess.DEVNULL if quiet else None
    try:
        status = subprocess.run(
            words, timeout=_LIMIT_S, stdin=subprocess.DEVNULL, stdout=out
        ).returncode
    except subprocess.TimeoutExpired:
        sys.exit(f"a job did not end within {_LIMIT_S} s: {' '.join(words)}")
    if status:
        sys.exit(f"a job failed with exit code {status}: {' '.join(words)}")
