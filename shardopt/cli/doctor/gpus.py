"""The GPUs of a job's ranks, and whether the ranks of a node reach each other's."""

import os
import resource
from dataclasses import replace
from pathlib import Path

from mpi4py import MPI

from shardopt.backends.cuda.peers import Peers, find_slurm_binding
from shardopt.backends.cuda.probing import describe_device, try_peers
from shardopt.backends.cuda.software import examine_software
from shardopt.cli.doctor.facts import RankGpu
from shardopt.cli.doctor.watch import Watch
from shardopt.comm.topology import Topology


def count_gpus() -> int:
    """Count the NVIDIA GPUs that this machine or container shows, without loading anything."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def describe_gpus(topology: Topology, watch: Watch) -> tuple[RankGpu | None, Peers | None]:
    """Describe the GPU that this rank takes, and try to reach those of its node's other ranks.

    On a node without GPUs nothing is loaded and nothing is tried.

    Collective: every rank.

    Returns:
        What the rank has, and what the node's ranks can do together; None if there is nothing.
    """
    node_comm = topology.node_comm
    with watch.together("a look at the GPUs", topology.comm):
        if not node_comm.allreduce(count_gpus() > 0, MPI.LOR):
            return None, None
        gpu = _describe_gpu(topology.node_rank)
        can_try = node_comm.allreduce(gpu.device is not None, MPI.LAND)
    with watch.over("a test of the GPUs' memory"):
        if not can_try or gpu.device is None:
            return gpu, None
        return gpu, try_peers(node_comm, gpu.device.number)


def take_device(node_rank: int, num_devices: int) -> int | None:
    """Return the number of the GPU that a rank takes, as the launchers and train_lm.py choose it.

    Args:
        node_rank: The rank's number on its node.
        num_devices: The GPUs that it sees: all of the node's, or those that a launcher left it.
    """
    return node_rank % num_devices if num_devices else None


def _describe_gpu(node_rank: int) -> RankGpu:
    software, device = examine_software(), None
    number = take_device(node_rank, software.num_devices)
    if software.problem is None and number is not None:
        try:
            device = describe_device(number)
        except Exception as error:  # CUDA's own, which are known once CuPy is loaded
            software = replace(software, problem=f"GPU {number} cannot be used ({error}).")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return RankGpu(
        software=software,
        device=device,
        pinned_nbytes=None if limit == resource.RLIM_INFINITY else limit,
        slurm_binding=find_slurm_binding(os.environ),
    )
