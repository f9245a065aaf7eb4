"""The limits of a step that are measured beside it: memory, links and a disk."""

import time
from collections.abc import Callable, Mapping

import numpy as np
from mpi4py import MPI

from benchmarks.cases.scaling import (
    ALL_AXPYS,
    DISK_RATE,
    LIMIT,
    LINK_RATE,
    LINKS,
    MEMORY_RATE,
)
from benchmarks.contenders.internals import Topology, memory_nbytes
from benchmarks.contenders.problem import DTYPE, Problem
from benchmarks.harness.placing import fill_random, page_aligned
from benchmarks.harness.result import Result
from benchmarks.harness.scratch import scratch_folder, write_directly
from shardopt import numpy as shardopt_numpy
from shardopt.measure.links import Messages, measure_all_gather
from shardopt.measure.memory import Triad

_AXPY_NUMEL = 1 << 23  # of each rank, beyond its caches
_DISK_NBYTES = 64 << 20
_MESSAGE_NBYTES = 4 << 20


class Limits:
    """The rates of memory and links while all ranks of a group are at work.

    Collective: construction and what ``runs`` has.

    Args:
        problem: The model.
        topology: The ranks that train it.

    Attributes:
        runs: What is timed beside the contenders, by name.
    """

    def __init__(self, problem: Problem, topology: Topology) -> None:
        self._topology = topology
        numel = max(problem.threads, min(_AXPY_NUMEL, problem.numel))
        self._triad = Triad(numel, DTYPE, problem.threads)
        self.runs: dict[str, Callable[[], object]] = {ALL_AXPYS: self._triad.axpy}
        if topology.num_nodes > 1:
            self._messages = plan_messages(problem.numel, topology.num_nodes, topology.node_size)
            self.runs[LINKS] = self._exchange

    def figures(self, result: Result, optimizer: shardopt_numpy.NAdam) -> Mapping[str, float]:
        """Return rates, and the least time of a step: of memory or of links, the longer one.

        Args:
            result: Has the samples of ``runs``.
            optimizer: This project's, whose bytes count.
        """
        node_size, axpy_s = self._topology.node_size, result.value(ALL_AXPYS)
        rate = node_size * self._triad.nbytes / axpy_s
        found = {MEMORY_RATE: rate / 1e9, LIMIT: memory_nbytes(optimizer) / rate}
        if LINKS in self.runs:
            links_s, messages = result.value(LINKS), self._messages
            sent_nbytes = node_size * messages.nbytes * messages.count
            found[LINK_RATE] = 8 * sent_nbytes / links_s / 1e9
            found[LIMIT] = max(found[LIMIT], links_s)
        return found

    def close(self) -> None:
        """Free the memory."""
        self._triad.close()

    def _exchange(self) -> None:
        measure_all_gather(self._topology.lane_comm, self._messages)


def plan_messages(numel: int, num_nodes: int, node_size: int) -> Messages:
    """Return the messages of a rank that carry as much as it must send in a step.

    Args:
        numel: Parameters, of 4 bytes each.
        num_nodes: Nodes, at least two: each sends 2 (M-1)/M of the parameters' bytes.
        node_size: Ranks that share this.
    """
    nbytes = 2 * 4 * numel * (num_nodes - 1) // (num_nodes * node_size)
    each = max(1, min(_MESSAGE_NBYTES, nbytes // (num_nodes - 1)))
    return Messages(each, max(1, round(nbytes / each)))


def disk_rate(folder: str | None) -> Mapping[str, float]:
    """Return what a disk takes, if it takes direct writes.

    Args:
        folder: On the disk; None takes the system's for temporary files.
    """
    content = page_aligned(_DISK_NBYTES // 4, DTYPE)
    fill_random(content, 1.0, 0)
    with scratch_folder(MPI.COMM_SELF, folder) as scratch:
        start_s = time.perf_counter()
        try:
            write_directly(scratch / "file", content.view(np.uint8))
        except OSError:  # of a file system without direct writes
            return {}
        return {DISK_RATE: content.nbytes / (time.perf_counter() - start_s) / 1e9}
