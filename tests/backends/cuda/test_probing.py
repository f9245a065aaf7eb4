"""Ranks of a node find out whether they reach each other's GPUs, and agree on the answer."""

import os
import sys
from pathlib import Path

import pytest

from shardopt.backends.cuda.peers import Peers
from shardopt.backends.cuda.probing import probe_peers, read_pid_namespace
from shardopt.comm.failure import Abort
from tests.support.arena_cupy import ArenaCupy

ROOT = Path(__file__).parents[3]


@pytest.fixture
def cupy(comm, monkeypatch):
    """A CuPy on GPUs that reach each other."""
    cupy = ArenaCupy(comm)
    cupy.install(monkeypatch)
    return cupy


def probe(comm):
    """Probe with one GPU for each rank."""
    return probe_peers(comm, comm.rank, 60.0, Abort())


@pytest.mark.mpi
def test_all_reach_all(comm, cupy):
    for _ in range(2):
        assert probe(comm) == Peers(True)
        assert cupy.opened == cupy.events == cupy.current == []


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("culprit", [0, -1])
@pytest.mark.parametrize(
    ("flaw", "told"),
    [
        ("ipcGetMemHandle", "could not share memory of its GPU (CUDARuntimeError: cudaErrorInva"),
        ("ipcOpenMemHandle", "could not open memory of rank {peer} (NVIDIA H200) (CUDARuntimeE"),
        ("ipcOpenEventHandle", "could not wait for what is written to memory of rank {peer} (NVI"),
        ("streamWaitEvent", "could not wait for what is written to memory of rank {peer} (NVIDIA"),
        ("write", "could not write to memory of "),
        ("read", "could not read memory of "),
        ("ipcCloseMemHandle", "could not close memory of rank {peer} (NVIDIA H200) (CUDARuntim"),
        (
            "lost write",
            "(_DifferentBytesError: not the bytes that rank {culprit} of its node wrote",
        ),
        ("other block", "(_DifferentBytesError: not the bytes that rank {culprit} of its node wr"),
        ("other bytes", "rank {culprit} (NVIDIA H200) could not read memory of"),
    ],
)
def test_what_one_rank_cannot_do_none_does(comm, cupy, flaw, told, culprit):
    culprit %= comm.size
    assert probe(comm) == Peers(True)  # leaves in memory what must not pass for new
    cupy.flaw = flaw if comm.rank == culprit else ""
    found = comm.allgather(probe(comm))
    assert len(set(found)) == 1
    assert not found[0].is_direct
    assert told.format(culprit=culprit, peer=0 if culprit else 1) in found[0].reason
    assert cupy.opened == cupy.events == cupy.current == []
    cupy.flaw = ""
    assert probe(comm) == Peers(True)  # all ranks are where they were


@pytest.mark.mpi(min_size=2)
def test_a_rank_without_cupy(comm, cupy, monkeypatch):
    if comm.rank == 1:
        monkeypatch.setitem(sys.modules, "cupy", None)
    told = "rank 1 could not share memory of its GPU (ModuleNotFoundError: import of cupy halted; "
    found = probe(comm)
    assert not found.is_direct
    assert found.reason.startswith(told)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("sees_others", "reachable"), [(True, False), (True, True), (False, True)])
def test_the_driver_is_asked_for_the_cause(comm, cupy, sees_others, reachable):
    cupy.flaw = "ipcOpenMemHandle"
    cupy.sees_others, cupy.reachable = sees_others, reachable
    told = "The driver reports no peer access between these GPUs."
    assert (told in probe(comm).reason) == (sees_others and not reachable)


@pytest.mark.mpi
def test_a_single_rank_tries_nothing(comm, cupy):
    from mpi4py import MPI

    cupy.flaw = "ipcGetMemHandle"
    assert probe(MPI.COMM_SELF) == Peers(True)


def test_the_namespace_of_this_process():
    assert read_pid_namespace() == os.readlink(f"/proc/{os.getpid()}/ns/pid")


HANGS = """
import pytest
from mpi4py import MPI
from shardopt.backends.cuda.probing import probe_peers
from shardopt.comm.failure import Abort
from tests.support.arena_cupy import ArenaCupy

comm = MPI.COMM_WORLD
cupy = ArenaCupy(comm)
cupy.flaw = "hang" if comm.rank == 1 else ""
with pytest.MonkeyPatch.context() as monkeypatch:
    cupy.install(monkeypatch)
    probe_peers(comm, 0, 1.0, Abort())
print("went on")
"""


def test_a_call_that_never_returns_ends_the_job(mpirun):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    job = mpirun(2, source=HANGS, env={"PYTHONPATH": path})
    assert job.returncode != 0
    assert "The probe of the node's GPUs did not complete within 1 s on rank" in job.stderr
    assert "went on" not in job.stdout


def test_cupy_has_all_that_its_stand_in_has():
    runtime = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.runtime
    calls = [
        name for name in vars(ArenaCupy) if name[0] != "_" and name not in ("install", "address_of")
    ]
    assert len(calls) >= 18
    assert [name for name in calls if not hasattr(runtime, name)] == []
