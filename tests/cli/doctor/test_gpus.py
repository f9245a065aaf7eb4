"""GPUs of ranks, with the node's shared memory in the place of theirs."""

import sys

import pytest

from shardopt.backends.cuda.peers import Peers
from shardopt.cli.doctor import gpus
from shardopt.cli.doctor.job import split
from shardopt.cli.doctor.watch import Watch
from tests.support.arena_cupy import ArenaCupy


@pytest.fixture
def topology(comm):
    topology = split(comm, Watch(60, comm.rank))
    yield topology
    topology.free()


@pytest.fixture
def cupy(topology, monkeypatch):
    """A CuPy that sees two GPUs on this node."""
    cupy = ArenaCupy(topology.node_comm, num_devices=2)
    cupy.install(monkeypatch)
    monkeypatch.setattr(gpus, "count_gpus", lambda: 2)
    return cupy


def describe(topology):
    return gpus.describe_gpus(topology, Watch(60, topology.rank))


@pytest.mark.mpi
def test_ranks_take_gpus_in_turn_and_reach_each_other(topology, cupy):
    gpu, peers = describe(topology)
    assert gpu.device.number == topology.node_rank % 2
    assert (gpu.software.cupy, gpu.software.cuda, gpu.software.problem) == ("14.2.0", "13.0", None)
    assert peers == Peers(True)


@pytest.mark.mpi
def test_gpus_that_one_rank_sees_are_looked_for_on_all(topology, cupy, monkeypatch):
    monkeypatch.setattr(gpus, "count_gpus", lambda: 2 * (topology.rank == 0))
    gpu, peers = describe(topology)
    assert gpu.device
    assert peers
    monkeypatch.setattr(gpus, "count_gpus", lambda: 0)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert describe(topology) == (None, None)


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_reaches_no_other(topology, cupy):
    last = topology.world_size - 1
    cupy.flaw = "ipcOpenMemHandle" if topology.rank == last else ""
    _, peers = describe(topology)
    assert topology.comm.bcast(peers) == peers
    assert f"rank {last} (NVIDIA H200) could not open memory of rank 0" in peers.reason


@pytest.mark.mpi
@pytest.mark.parametrize("flaw", ["no CuPy", "getDeviceProperties"])
def test_a_rank_without_a_gpu_keeps_all_from_trying(topology, cupy, monkeypatch, flaw):
    is_last = topology.rank == topology.world_size - 1
    told = "CuPy cannot be imported (import of cupy halted"
    if is_last and flaw == "no CuPy":
        monkeypatch.setitem(sys.modules, "cupy", None)
    elif is_last:
        cupy.flaw = flaw
        told = f"GPU {topology.node_rank % 2} cannot be used (cudaErrorInvalidValue: no getDevice"
    gpu, peers = describe(topology)
    assert peers is None
    assert (gpu.device is None) == is_last
    assert (gpu.software.problem or "").startswith(told if is_last else "")
    assert is_last or gpu.software.problem is None
