"""Time a step over several nodes: hosts on this machine, between which links have a limit.

python benchmarks/bench_nodes.py [--python .venv-mpich/bin/python --python ...]

Run it as root: it makes the hosts (tests/cluster/cluster.sh) and starts mpirun on them itself, that
of each --python, for 4 nodes of 1 rank and 2 nodes of 2 ranks. What ranks do is in nodes_job.py.
It takes some 75 seconds for each MPI and layout, and 6 GB of memory.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from names import FOLDER, NODES_NUMEL

_TESTS = FOLDER.parent / "tests"
_LAYOUTS = ("4x1", "2x2")
_LIMIT_S = 300


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", action="append", help="of an environment with an MPI, once for each (this one)"
    )
    parser.add_argument(
        "--layout", nargs="+", default=_LAYOUTS, metavar="NODESxRANKS", help="(4x1 2x2)"
    )
    parser.add_argument("--rate", default="1gbit", help="what each node may send (1gbit)")
    parser.add_argument("--numel", type=int, default=NODES_NUMEL, help="parameters (16 Mi)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each contender (5)")
    parser.add_argument("--bucket-mib", type=int, help="in all buckets (the policy's)")
    parser.add_argument("--only", choices=("step", "overlap"), help="leave out the other part")
    arguments = parser.parse_args()
    chosen = {name: getattr(arguments, name) for name in ("rate", "numel", "rounds")}
    chosen |= {"bucket-mib": arguments.bucket_mib, "only": arguments.only}
    options = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
    for layout in arguments.layout:
        num_nodes, node_size = map(int, layout.split("x"))
        for python in arguments.python or [sys.executable]:
            with hosts(num_nodes, node_size, arguments.rate) as prefix:
                run([*prefix, *command(python, num_nodes * node_size), *options])


@contextmanager
def hosts(num_hosts: int, slots: int, rate: str) -> Iterator[list[str]]:
    """Start hosts, up to the end of the block; gives what runs a command on the first."""
    folder = tempfile.mkdtemp(prefix="cluster-")
    script = ["env", f"CLUSTER_DIR={folder}", "bash", str(_TESTS / "cluster" / "cluster.sh")]
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


def command(python: str, num_ranks: int) -> list[str]:
    """Write how ranks are started with the mpirun that belongs to an interpreter's MPI."""
    lines = (_TESTS / "mpi.env").read_text().splitlines()
    env = [line for line in lines if line and not line.startswith("#")]
    env += ["GLOO_SOCKET_IFNAME=eth0", "MASTER_ADDR=10.0.0.1", "MASTER_PORT=29500"]
    env += ["TORCH_CPP_LOG_LEVEL=ERROR"]  # it warns that addresses have no names
    if "PYTHONPATH" in os.environ:
        env.append(f"PYTHONPATH={os.environ['PYTHONPATH']}")
    mpirun = Path(python).absolute().with_name("mpirun")  # not resolved: venvs link to another
    ranks = ["env", *env, str(Path(python).absolute()), str(FOLDER / "nodes_job.py")]
    return [str(mpirun), "-n", str(num_ranks), *ranks]


def run(words: list[str]) -> None:
    """Run a job to its end, or end this program if it fails."""
    try:
        status = subprocess.run(words, timeout=_LIMIT_S, stdin=subprocess.DEVNULL).returncode
    except subprocess.TimeoutExpired:
        sys.exit(f"a job must end within {_LIMIT_S} s; this one did not: {words}")
    if status:
        sys.exit(f"a job must end well; this one gave {status}: {' '.join(words)}")


if __name__ == "__main__":
    main()
